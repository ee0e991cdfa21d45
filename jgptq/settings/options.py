"""How an option is declared: once, as a field of a settings class, with all that others need to know of it.

The command line, rules, reports and the config of a written folder are derived from these declarations.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

_KEY = "option"


class _SameAsHere:
    """Marks an option that a folder by another program is taken to have at its default."""


SAME_AS_HERE = _SameAsHere()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """What is known of an option besides its name, type and default."""

    help: str  # one sentence, shown by `--help`
    values: tuple[Any, ...] = ()  # the allowed ones; empty where a range or a check says it
    least: float | None = None  # the smallest allowed number
    above: float | None = None  # a number that is too small
    most: float | None = None  # the largest allowed number
    check: Callable[[Any], str | None] | None = None  # the complaint about a value, or None
    advice: str = ""  # ends the complaint about a number that is out of range
    rule: bool = False  # whether a rule can set it for single linears
    stored: bool = False  # whether a reader of the files has to know it
    published: Any = SAME_AS_HERE  # what a folder by another program has, where that is plain GPTQ
    flag: str | None = None  # how the command line spells it, where `--name` is not the way


def option(default: Any, **known: Any) -> Any:
    """A dataclass field that is an option; `known` are the fields of `Option`."""
    return dataclasses.field(default=default, metadata={_KEY: Option(**known)})


def options(settings: type) -> Mapping[str, Option]:
    """The options of a settings class by name, in the order of declaration."""
    return {field.name: field.metadata[_KEY] for field in dataclasses.fields(settings) if _KEY in field.metadata}


def problems(settings: Any) -> list[str]:
    """A sentence on every option whose value is not allowed."""
    complaints = (
        complaint(name, known, getattr(settings, name), field.default)
        for name, known, field in (
            (field.name, field.metadata[_KEY], field) for field in dataclasses.fields(settings) if _KEY in field.metadata
        )
    )
    return [sentence for sentence in complaints if sentence is not None]


def complaint(name: str, known: Option, value: Any, default: Any) -> str | None:
    """Why an option cannot have a value, as a sentence, or None."""
    if known.values:
        return None if _in(value, known.values) else f"{name} must be one of {known.values}, found {value!r}"
    if known.check is not None:
        return known.check(value)
    if isinstance(default, bool):
        return None if isinstance(value, bool) else f"{name} must be true or false, found {value!r}"
    whole = isinstance(default, int)
    is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool) and math.isfinite(value)
    if is_number and _within(known, value):
        return None
    kind = "a whole number" if whole else "a number"
    return f"{name} must be {kind} {_range(known)}, found {value!r}{f'; {known.advice}' if known.advice else ''}"


def _in(value: Any, values: tuple[Any, ...]) -> bool:
    """Whether a value is among others of its own type: True is not 1."""
    return any(type(value) is type(other) and value == other for other in values)


def _within(known: Option, value: float) -> bool:
    return (
        (known.least is None or value >= known.least)
        and (known.above is None or value > known.above)
        and (known.most is None or value <= known.most)
    )


def _range(known: Option) -> str:
    low = f"({known.above:g}" if known.above is not None else f"[{known.least:g}" if known.least is not None else "(-inf"
    return f"in {low}, {f'{known.most:g}]' if known.most is not None else 'inf)'}"
