"""Writes the tables of options into `docs/options.md`, from the declarations in `jgptq/settings`: `make docs`."""

import dataclasses
from pathlib import Path
from typing import Any

from jgptq.settings.options import Option, allowed, flag, options
from jgptq.settings.presets import PRESETS
from jgptq.settings.run import QuantizeConfig

PAGE = Path(__file__).parent / "options.md"
BEGIN = "<!-- begin: written by docs/make_options.py -->"
END = "<!-- end: written by docs/make_options.py -->"


def preset_table() -> str:
    """Markdown: the options that each preset sets to another value than the default."""
    names = list(dict.fromkeys(name for changes in PRESETS.values() for name in changes))
    defaults = {field.name: field.default for field in dataclasses.fields(QuantizeConfig)}
    lines = [f"| preset | {' | '.join(f'`{name}`' for name in names)} |", "|---" * (len(names) + 1) + "|"]
    for preset, changes in PRESETS.items():
        lines.append(f"| `{preset}` | {' | '.join(str(changes.get(name, defaults[name])) for name in names)} |")
    return "\n".join(lines)


def option_table() -> str:
    """Markdown: a row for each option, in the order of declaration."""
    declared = options(QuantizeConfig)
    lines = ["| option | command line | default | rules | what it does |", "|---|---|---|---|---|"]
    lines += [
        _row(field.name, declared[field.name], field.default)
        for field in dataclasses.fields(QuantizeConfig)
        if field.name in declared
    ]
    return "\n".join(lines)


def _row(name: str, declared: Option, default: Any) -> str:
    values = allowed(declared)
    text = declared.help + (f" {values[0].upper()}{values[1:]}." if values else "")
    spelled = f"`{flag(name, declared, default)}`".replace("/", "` or `")
    return f"| `{name}` | {spelled} | `{default}` | {'yes' if declared.rule else 'no'} | {text.replace('|', chr(92) + '|')} |"


def with_tables(page: str) -> str:
    """A page whose marked section is replaced by the tables.

    Raises:
      ValueError: the page does not have the two marks, once each and in order.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(END) < page.index(BEGIN):
        raise ValueError(f"{PAGE} must have one line {BEGIN!r} and after it one line {END!r}; restore them")
    before, after = page.partition(BEGIN)[0], page.partition(END)[2]
    return f"{before}{BEGIN}\n{preset_table()}\n\n{option_table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print("wrote", PAGE)
