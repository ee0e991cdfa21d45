"""Which arrays of a traced model are packed and how, and why the others stay float."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping

from jgptq.errors import ConfigError
from jgptq.run.tiles import tile_columns
from jgptq.settings.rules import first_match, resolve, without_effect
from jgptq.settings.run import QuantizeConfig
from jgptq.settings.sizes import fitting_group_sizes, group_rows, packable
from jgptq.settings.solver import SolverConfig
from jgptq.trace.linears import Contents, Linear
from jgptq.trace.model import Model, Traced, is_float
from jgptq.trace.segments import Cut, Group, LayerLoop

Lengths = tuple[int, ...]
"""How many layers are stacked along each leading axis of an array; empty where none are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TracedPlan:
    """What happens to each float array of a model, by its index."""

    settings: Mapping[int, SolverConfig]  # of those that are packed
    linears: Mapping[int, Linear]  # whose weights these are
    lengths: Mapping[int, Lengths]
    kept_float: Mapping[int, str]  # the reason why each other array stays float
    idle_rules: tuple[str, ...]  # a sentence on each rule that has no effect


def layer_names(name: str, lengths: Lengths) -> list[str]:
    """The names of the layers of an array: with their indices in brackets, `blocks.up.kernel[3]`."""
    return [name + "".join(f"[{i}]" for i in index) for index in itertools.product(*map(range, lengths))]


def plan_traced(model: Model, traced: Traced, config: QuantizeConfig) -> TracedPlan:
    """Plans a run.

    Args:
      model: the model.
      traced: its computation.
      config: the run's settings.

    Raises:
      ConfigError: rules treat layers of one array differently, a linear that would be packed has a K that its group size does
        not divide, or no linear can be packed.
    """
    linears: dict[int, Linear] = {}
    lengths: dict[int, Lengths] = {}
    kept: dict[int, str] = {}
    names: list[str] = []
    settings: dict[int, SolverConfig] = {}
    stacks = {linear.leaf: sizes for linear, sizes in _all_linears(traced.contents, ())}
    for leaf, array in enumerate(model.arrays):
        if not is_float(array):
            continue
        uses = traced.uses[leaf]
        if reason := _why_float(uses):
            kept[leaf] = reason
            continue
        assert isinstance(uses[0], Linear)
        linears[leaf], lengths[leaf] = uses[0], stacks[leaf]
        layers = layer_names(model.names[leaf], lengths[leaf])
        names += layers
        chosen = _agreed(config, layers)
        if chosen is None:
            rule = first_match(config.rules, layers[0])
            kept[leaf] = f"skipped by rule {rule.pattern if rule else ''!r}"
        else:
            settings[leaf] = chosen
    _check_sizes(model, linears, settings, kept)
    return TracedPlan(
        settings=settings,
        linears=linears,
        lengths=lengths,
        kept_float=kept,
        idle_rules=tuple(without_effect(config, names)) if config.rules else (),
    )


def _all_linears(contents: Contents, lengths: Lengths) -> Iterator[tuple[Linear, Lengths]]:
    """Every linear of a program and of its loops, with the lengths of the loops around it."""
    yield from ((linear, lengths) for linear in contents.linears)
    for loop in contents.loops.values():
        yield from _all_linears(loop.contents, (*lengths, loop.length))


def _why_float(uses: list[Linear | str]) -> str | None:
    """Why an array cannot be packed; None where it is the weight of one linear, and nothing else."""
    reasons = list(dict.fromkeys(use for use in uses if isinstance(use, str)))
    linears = [use for use in uses if isinstance(use, Linear)]
    if not uses:
        return "the function does not read it"
    if not linears:
        return "; ".join(reasons)
    if reasons:
        return f"it is the weight of a linear, and {'; '.join(reasons)}"
    if len(linears) > 1:
        return f"it is the weight of {len(linears)} linears, which read different values"
    return packable(*linears[0].shape)


def _agreed(config: QuantizeConfig, layers: list[str]) -> SolverConfig | None:
    """The settings of all layers of an array."""
    settings = {name: resolve(config, name) for name in layers}
    first, *others = dict.fromkeys(settings.values())
    if others:
        different = next(name for name, used in settings.items() if used == others[0])
        raise ConfigError(
            f"the rules give {layers[0]} and {different} different settings, but they are layers of one array, which is packed "
            "as one; give them the same"
        )
    return first


def _check_sizes(
    model: Model, linears: Mapping[int, Linear], settings: Mapping[int, SolverConfig], kept: Mapping[int, str]
) -> None:
    """Refuses a plan that packs nothing, or a linear whose group size does not divide its K."""
    if not settings:
        reasons = "; ".join(f"{model.names[leaf]}: {reason}" for leaf, reason in itertools.islice(kept.items(), 8))
        raise ConfigError(f"no linear can be packed ({reasons}); see docs/any_model.md for what is found")
    unfit = [
        f"{model.names[leaf]} has K={linears[leaf].shape[0]} and group_size {used.group_size}"
        for leaf, used in settings.items()
        if linears[leaf].shape[0] % group_rows(linears[leaf].shape[0], used.group_size)
    ]
    if unfit:
        fitting = ", ".join(map(str, fitting_group_sizes([linears[leaf].shape[0] for leaf in settings])))
        raise ConfigError(f"group_size does not divide K: {'; '.join(unfit)}. Sizes that fit every linear: {fitting}")


def by_settings(group: Group, settings: Mapping[int, SolverConfig]) -> dict[SolverConfig, list[Linear]]:
    """The linears of a group that are solved together: those of the same settings."""
    parts: dict[SolverConfig, list[Linear]] = {}
    for linear in group.linears:
        parts.setdefault(settings[linear.leaf], []).append(linear)
    return parts


def columns_of(cut: Cut, settings: Mapping[int, SolverConfig]) -> dict[tuple[int, SolverConfig], int]:
    """The columns that are solved at once, by K and settings."""
    widths: dict[tuple[int, SolverConfig], list[int]] = {}
    for group, times in groups_of(cut):
        for used, linears in by_settings(group, settings).items():
            width = sum(linear.shape[1] for linear in linears)
            widths.setdefault((linears[0].shape[0], used), []).extend([width] * times)
    return {key: tile_columns(sizes) for key, sizes in widths.items()}


def groups_of(cut: Cut) -> Iterator[tuple[Group, int]]:
    """Every group of a cut program and of its loops, with how often it is solved."""
    for action in cut.actions:
        if isinstance(action, Group):
            yield action, 1
        elif isinstance(action, LayerLoop):
            yield from ((group, times * action.loop.length) for group, times in groups_of(action.body))
