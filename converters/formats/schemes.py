"""The `config_groups` of a compressed-tensors config: which linear has which scheme."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from converters.formats.settings import check_patterns
from jgptq.errors import ArchitectureError, CheckpointError
from jgptq.settings.rule import Rule

CLASSES = ("Linear", "LinearBase")
"""Class names as targets: every linear of a decoder is one of these."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """How the linears of one group are packed."""

    bits: int
    group_size: int  # rows of K in a group, or -1 for a scale per column
    sym: bool
    reordered: bool  # whether the group of each row is stored
    targets: tuple[str, ...]  # names, `re:` and a regex for names, or class names

    def to_json(self) -> dict[str, Any]:
        """The group as the config states it."""
        weights: dict[str, Any] = {"num_bits": self.bits, "type": "int", "symmetric": self.sym, "dynamic": False}
        weights |= {"strategy": "channel"} if self.group_size == -1 else {"strategy": "group", "group_size": self.group_size}
        weights |= {"actorder": "group"} if self.reordered else {}
        return {"targets": list(self.targets), "weights": weights, "input_activations": None, "output_activations": None}

    @property
    def has_class(self) -> bool:
        """Whether a target is a class, which all linears are."""
        return any(target in CLASSES for target in self.targets)


@dataclasses.dataclass(frozen=True)
class Schemes:
    """All groups of a config, and the linears that are float although a target matches them."""

    groups: tuple[Scheme, ...]
    ignore: tuple[str, ...]

    def of(self, name: str) -> Scheme | None:
        """The scheme of a linear, None where it is float: by its exact name, then by regex, then by class, as the
        compressed-tensors package orders them."""
        if any(_matches(name, target) for target in self.ignore):
            return None
        targets = [(target, scheme) for scheme in self.groups for target in scheme.targets]
        by_name = sorted((pair for pair in targets if _matches(name, pair[0])), key=lambda pair: _rank(pair[0]))
        return by_name[0][1] if by_name else None

    @property
    def base(self) -> Scheme:
        """The scheme of the class `Linear`, else the first."""
        return next((scheme for scheme in self.groups if scheme.has_class), self.groups[0])

    def rules(self) -> tuple[Rule, ...]:
        """The same in rules, of which the first match wins: what is ignored, then names, then regexes. The head is float without
        a rule, and a class is what the run's own settings are for."""
        named = [(target, scheme) for scheme in self.groups for target in scheme.targets if target not in CLASSES]
        grids: dict[str, Scheme | None] = {_regex(target): None for target in self.ignore if target not in (*CLASSES, "lm_head")}
        for target, scheme in sorted(named, key=lambda pair: _rank(pair[0])):
            grids.setdefault(_regex(target), scheme)
        return tuple(_rule(pattern, scheme) for pattern, scheme in grids.items())


def read_schemes(quantization: Mapping[str, Any], widths: Sequence[int]) -> Schemes:
    """Reads `config_groups` and `ignore`.

    Args:
      quantization: the `quantization_config` of a compressed-tensors checkpoint.
      widths: the bits that can be read.

    Raises:
      ArchitectureError: a format, or a scheme, that is not implemented; all of them at once.
      CheckpointError: a config that is malformed.
    """
    stated = quantization.get("format")
    if stated != "pack-quantized":
        raise ArchitectureError(
            f"config.json: compressed-tensors format {stated!r} cannot be read; expected 'pack-quantized' (integer codes of "
            f"{' or '.join(map(str, widths))} bits)"
        )
    groups, ignore = quantization.get("config_groups"), quantization.get("ignore") or []
    if not isinstance(groups, Mapping) or not groups or not isinstance(ignore, list):
        raise CheckpointError("config.json: quantization_config needs config_groups as an object and ignore as a list")
    problems = [problem for name, group in groups.items() for problem in _problems(name, group, widths)]
    if quantization.get("kv_cache_scheme") is not None:
        problems.append("kv_cache_scheme is set, expected none")
    if quantization.get("transform_config"):
        problems.append("transform_config is set, expected none")
    if problems:
        raise ArchitectureError("config.json: compressed-tensors schemes that cannot be read: " + "; ".join(problems))
    schemes = tuple(_scheme(group) for group in groups.values())
    for target in (*ignore, *(target for scheme in schemes for target in scheme.targets)):
        _check_target(target)
    targets = (*ignore, *(target for scheme in schemes for target in scheme.targets))
    check_patterns((target.removeprefix("re:") for target in targets if target.startswith("re:")), "config_groups")
    return Schemes(schemes, tuple(ignore))


def _problems(name: str, group: Any, widths: Sequence[int]) -> list[str]:
    """What of a group is not implemented, in words."""
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        return [f"{name} has no weights; expected an object with targets and weights"]
    weights = group["weights"]
    wanted: dict[str, tuple[Any, ...]] = {
        "type": ("int",),
        "num_bits": tuple(widths),
        "strategy": ("group", "channel"),
        "dynamic": (False, None),
        "actorder": (None, False, "group", "static", "weight", "dynamic"),
    }
    stated = {"type": "int", "strategy": _inferred_strategy(weights)} | {key: weights[key] for key in weights if key in wanted}
    problems = [
        f"{name} has {key} {stated.get(key)!r}, expected {' or '.join(map(repr, values))}"
        for key, values in wanted.items()
        if stated.get(key) not in values
    ]
    size = weights.get("group_size")
    if stated["strategy"] == "group" and (not isinstance(size, int) or size <= 0):
        problems.append(f"{name} has group_size {size!r}, expected a positive whole number")
    problems += [f"{name} quantizes {part}" for part in ("input_activations", "output_activations") if group.get(part)]
    if group.get("format") not in (None, "pack-quantized"):
        problems.append(f"{name} has format {group['format']!r}, expected 'pack-quantized'")
    if not isinstance(group.get("targets"), list):
        problems.append(f"{name} has no list of targets")
    return problems


def _inferred_strategy(weights: Mapping[str, Any]) -> str | None:
    """The strategy of weights that state none."""
    size = weights.get("group_size")
    return None if size is None else ("channel" if size == -1 else "group")


def _scheme(group: Mapping[str, Any]) -> Scheme:
    weights = group["weights"]
    strategy = weights.get("strategy") or _inferred_strategy(weights)
    return Scheme(
        bits=weights["num_bits"],
        group_size=weights["group_size"] if strategy == "group" else -1,
        sym=bool(weights.get("symmetric", True)),
        reordered=weights.get("actorder") in ("group", "dynamic"),
        targets=tuple(group["targets"]),
    )


def _check_target(target: Any) -> None:
    try:
        re.compile(target.removeprefix("re:") if target.startswith("re:") else "")
    except (AttributeError, re.error) as error:
        raise CheckpointError(f"config.json: target {target!r} of quantization_config is no name and no regex: {error}") from None


def _matches(name: str, target: str) -> bool:
    """Whether a target means a linear of this name."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target == name or target in CLASSES


def _rank(target: str) -> tuple[bool, bool, str]:
    """Exact names first, then regexes, then classes; of alike ones the first by alphabet."""
    return target in CLASSES, target.startswith("re:"), target


def _regex(target: str) -> str:
    """A target as the pattern of a rule."""
    return target.removeprefix("re:") if target.startswith("re:") else rf"{re.escape(target)}$"


def _rule(pattern: str, scheme: Scheme | None) -> Rule:
    """A rule that gives linears the grid of a scheme, or leaves them float."""
    if scheme is None:
        return Rule(pattern=pattern, skip=True)
    return Rule(pattern=pattern, bits=scheme.bits, group_size=scheme.group_size, sym=scheme.sym)
