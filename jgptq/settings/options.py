"""How an option is declared: once, as a field of a settings class.

The command line, rules, reports, the config of a written folder and the table of `docs/options.md` are derived from these
declarations.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

_KEY = "option"


class _SameAsHere:
    """The type of `SAME_AS_HERE`."""


SAME_AS_HERE = _SameAsHere()
"""The value of `Option.published` of an option that other programs have as well, with the same meaning."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """The declaration of an option; its name, type and default are those of the dataclass field."""

    help: str  # what it does, for `--help` and the documentation
    values: tuple[Any, ...] = ()  # the allowed values; empty where a range or a check decides
    least: float | None = None  # inclusive lower bound
    above: float | None = None  # exclusive lower bound
    most: float | None = None  # inclusive upper bound
    check: Callable[[Any], str | None] | None = None  # value -> error message, or None where the value is allowed
    advice: str = ""  # what to try, at the end of the error message about a number out of range
    rule: bool = False  # whether a rule can set it for single linears
    stored: bool = False  # whether the packed tensors cannot be read without it
    published: Any = SAME_AS_HERE  # the value assumed for a folder that does not record it: that of plain GPTQ
    flag: str | None = None  # spelling on the command line, where it is not `--name`


def option(default: Any, **declaration: Any) -> Any:
    """A dataclass field that is an option.

    Args:
      default: its default value; the type of the default is the type of the option.
      **declaration: the fields of `Option`.

    Example:
      >>> @dataclasses.dataclass(frozen=True, kw_only=True)
      ... class Settings:
      ...     damping: float = option(0.01, help="Added to the diagonal.", above=0, most=1)
    """
    return dataclasses.field(default=default, metadata={_KEY: Option(**declaration)})


def options(settings: type) -> Mapping[str, Option]:
    """The options of a settings class by name, in the order of declaration."""
    return {field.name: field.metadata[_KEY] for field in dataclasses.fields(settings) if _KEY in field.metadata}


def problems(settings: Any) -> list[str]:
    """An error message for every option whose value is not allowed."""
    declared = options(type(settings))
    messages = (
        problem(field.name, declared[field.name], getattr(settings, field.name), field.default)
        for field in dataclasses.fields(settings)
        if field.name in declared
    )
    return [message for message in messages if message is not None]


def problem(name: str, declared: Option, value: Any, default: Any) -> str | None:
    """The error message for a value that an option cannot have, or None."""
    if declared.values:
        return None if _in(value, declared.values) else f"{name} must be one of {declared.values}, found {value!r}"
    if declared.check is not None:
        return declared.check(value)
    if isinstance(default, bool):
        return None if isinstance(value, bool) else f"{name} must be true or false, found {value!r}"
    whole = isinstance(default, int)
    is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool) and math.isfinite(value)
    if is_number and _within(declared, value):
        return None
    kind = "a whole number" if whole else "a number"
    return f"{name} must be {kind} {_interval(declared)}, found {value!r}{f'; {declared.advice}' if declared.advice else ''}"


def flag(name: str, declared: Option, default: Any) -> str:
    """How the command line spells an option; a switch has a second spelling that turns it off, after a slash."""
    spelled = name.replace("_", "-")
    return declared.flag or (f"--{spelled}/--no-{spelled}" if isinstance(default, bool) else f"--{spelled}")


def allowed(declared: Option) -> str:
    """The allowed values of an option as a phrase, such as "0 to 1"; empty where its help or its type says it."""
    if declared.values:
        return f"one of {', '.join(str(value) for value in declared.values if value is not None)}"
    if declared.above is not None:
        return f"above {declared.above:g}" + ("" if declared.most is None else f", at most {declared.most:g}")
    if declared.least is not None:
        return f"{declared.least:g} " + ("or more" if declared.most is None else f"to {declared.most:g}")
    return ""


def _in(value: Any, values: tuple[Any, ...]) -> bool:
    """Whether a value is one of `values`, of the same type: True is not 1."""
    return any(type(value) is type(other) and value == other for other in values)


def _within(declared: Option, value: float) -> bool:
    return (
        (declared.least is None or value >= declared.least)
        and (declared.above is None or value > declared.above)
        and (declared.most is None or value <= declared.most)
    )


def _interval(declared: Option) -> str:
    if declared.above is not None:
        low = f"({declared.above:g}"
    else:
        low = f"[{declared.least:g}" if declared.least is not None else "(-inf"
    return f"in {low}, {f'{declared.most:g}]' if declared.most is not None else 'inf)'}"
