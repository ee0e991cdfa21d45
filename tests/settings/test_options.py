"""Options are declared once: what is derived from the declarations agrees with them."""

import dataclasses
import re
import runpy
from pathlib import Path

import pytest

from jgptq import notation
from jgptq.errors import ConfigError
from jgptq.settings.options import allowed, flag, option, options, problems
from jgptq.settings.run import QuantizeConfig

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    share: float = option(0.5, help="A share.", above=0, most=1, advice="the usual value is 0.5")
    rounds: int = option(0, help="A count.", least=0)
    part: float = option(0.0, help="A part.", least=0, most=1)
    kind: str = option("a", help="A kind.", values=("a", "b"))
    fast: bool = option(False, help="A switch.")
    wide: bool = option(False, help="A switch.", flag="--wide/--narrow")


def test_the_page_of_options_is_what_is_declared():
    generator = runpy.run_path(str(ROOT / "docs" / "make_options.py"))
    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert generator["with_tables"](page) == page, "run make docs"
    for name in options(QuantizeConfig):
        assert f"| `{name}` |" in page


@pytest.mark.parametrize("damage", ["", "<!-- end: written by docs/make_options.py -->\n"])
def test_a_page_without_its_marks_is_refused(damage: str):
    generator = runpy.run_path(str(ROOT / "docs" / "make_options.py"))
    with pytest.raises(ValueError, match=r"options\.md must have one line .*begin"):
        generator["with_tables"](damage)


def test_values_that_are_not_allowed_are_all_reported_with_what_is():
    wrong = Settings(share=0.0, rounds=-1, part=1.5, kind="c", fast=1)  # type: ignore[arg-type]
    assert problems(wrong) == [
        "share must be a number in (0, 1], found 0.0; the usual value is 0.5",
        "rounds must be a whole number in [0, inf), found -1",
        "part must be a number in [0, 1], found 1.5",
        "kind must be one of ('a', 'b'), found 'c'",
        "fast must be true or false, found 1",
    ]
    assert problems(Settings(share=1.0, rounds=3, part=0.0, kind="b", fast=True)) == []


def test_flags_and_allowed_values_follow_from_the_declaration():
    declared = options(Settings)
    defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
    flags = {name: flag(name, one, defaults[name]) for name, one in declared.items()}
    assert (flags["share"], flags["fast"], flags["wide"]) == ("--share", "--fast/--no-fast", "--wide/--narrow")
    assert {name: allowed(one) for name, one in declared.items()} == {
        "share": "above 0, at most 1",
        "rounds": "0 or more",
        "part": "0 to 1",
        "kind": "one of a, b",
        "fast": "",
        "wide": "",
    }


def test_every_option_of_a_run_names_what_it_does():
    short = [name for name, one in options(QuantizeConfig).items() if not re.fullmatch(r"\S.{15,}\.", one.help, re.DOTALL)]
    assert short == []
    with pytest.raises(ConfigError, match=r"damping must be a number in \(0, 1\], found 0; the usual value is 0\.01"):
        QuantizeConfig(damping=0)


def test_the_legend_explains_every_letter_that_annotations_use():
    explained = set(re.findall(r"(?:^    | {2,})([A-Za-z])  ", str(notation.__doc__), re.MULTILINE)) | {"M"}
    used = {
        letter
        for folder in ("jgptq", "pallas_kernels", "converters")
        for path in (ROOT / folder).rglob("*.py")
        for axes in re.findall(r'(?:Float|Int|Bool|UInt8)\[[^"\n]*"([^"]*)"\]', path.read_text(encoding="utf-8"))
        for letter in re.findall(r"(?<![\w*])[A-Za-z](?!\w)", axes)
    }
    assert len(used) > 10
    assert used - explained == set()
