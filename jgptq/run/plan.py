"""Which linears of a decoder a run packs and how, which stay float and why, decided from shapes alone before anything is read."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from jgptq.errors import ConfigError
from jgptq.models import Decoder, ExpertLinear, Fusion, Head, Linear, Stage, Unit, checkpoint_name, single_linears
from jgptq.settings.rules import first_match, resolve, without_effect
from jgptq.settings.run import QuantizeConfig
from jgptq.settings.sizes import fitting_group_sizes, group_rows, packable
from jgptq.settings.solver import SolverConfig
from jgptq.solver.methods import method_of


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """What happens to one stage of a block."""

    names: tuple[str, ...]  # dotted paths of its linears within the block
    kept_float: str | None  # the reason why all of them stay float, or None: all are packed
    config: SolverConfig  # of all of them; the run's where they stay float
    single: tuple[str, ...] = ()  # dotted paths of the linears that files hold: one for each expert of a stack
    pulls: bool = False
    """Whether what it gives in the float model is summed, in place of the drift of its inputs, which is less work."""
    sums_itself: bool = False  # whether what it reads is summed for a part of its linears at a time, when they are solved


Plan = tuple[StagePlan, ...]
AnyLinear = Linear | ExpertLinear


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A run, decided from shapes and settings before anything is read."""

    units: tuple[Unit, ...]  # what is quantized one after the other
    plans: tuple[Plan, ...]  # the plan of each
    widths: Mapping[tuple[int, SolverConfig], Sequence[int]]  # K, settings -> out-features of every stage that is packed so
    needs_tokens: str | None  # what needs calibration tokens, as a phrase; None where nothing does
    follows: bool  # whether the float model runs next to the quantized one
    idle_rules: tuple[str, ...]  # a sentence on each rule that has no effect


def plan_run(params: Decoder, config: QuantizeConfig) -> RunPlan:
    """Plans a run.

    Args:
      params: the decoder; only shapes of its leaves are looked at.
      config: the run's settings.

    Raises:
      ConfigError: linears that one solve serves or that readers fuse get different settings, a linear that would be packed has
        a K that its group size does not divide, no linear can be packed, or the head is asked for and is tied to the embedding.
    """
    parts = units(params, config)
    plans = [_plan_unit(unit, unit_prefix(unit, index), config) for index, unit in enumerate(parts)]
    _check_sizes(parts, plans)
    widths = _packed_widths(parts, plans)
    used = [settings for _, settings in widths]
    return RunPlan(
        units=tuple(parts),
        plans=tuple(plans),
        widths=widths,
        needs_tokens=_need_of_tokens(config.tune, used),
        follows=config.tune > 0 or any(method_of(settings).statistics.float_model for settings in used),
        idle_rules=tuple(_idle_rules(parts, config)),
    )


def units(params: Decoder, config: QuantizeConfig) -> list[Unit]:
    """What a run quantizes one after the other: the blocks, and the head where it is asked for.

    Raises:
      ConfigError: the head is asked for, and is tied to the embedding.
    """
    if not config.lm_head:
        return list(params.layers)
    if (head := params.head()) is None:
        message = (
            "lm_head=True (--lm-head): this model's output projection is its embedding (tie_word_embeddings), which stays float"
        )
        raise ConfigError(f"{message}; untie them in the checkpoint first, or leave the head out")
    return [*params.layers, head]


def unit_prefix(unit: Unit, index: int) -> str:
    """The prefix that makes paths in the decoder of the names of a unit's linears."""
    return "" if isinstance(unit, Head) else f"layers.{index}."


def _check_sizes(parts: Sequence[Unit], plans: Sequence[Plan]) -> None:
    """Refuses a plan that packs nothing, or a linear whose group size does not divide its K."""
    if not any(decision.kept_float is None for plan in plans for decision in plan):
        raise ConfigError(f"no linear can be packed: {plans[0][0].kept_float if plans else 'the decoder has no blocks'}")
    sizes: dict[int, dict[int, str]] = {}
    for path, linears, decision in _packed_stages(parts, plans):
        sizes.setdefault(decision.config.group_size, {}).setdefault(_features(linears), path)
    problems = []
    for group_size, paths in sizes.items():
        if unfit := [f"{path} has K={k}" for k, path in paths.items() if k % group_rows(k, group_size)]:
            which = "every linear" if len(sizes) == 1 else "every linear of these settings"
            fitting = ", ".join(str(size) for size in fitting_group_sizes(list(paths)))
            problems.append(f"group_size {group_size} does not divide K: {'; '.join(unfit)}. Sizes that fit {which}: {fitting}")
    if problems:
        raise ConfigError("; ".join(problems))


def settings_by_path(params: Decoder, config: QuantizeConfig) -> dict[str, SolverConfig | None]:
    """The settings of every linear that a run goes through, by its path in the decoder; None where it stays float.

    Raises:
      ConfigError: as `plan_run`.
    """
    settings: dict[str, SolverConfig | None] = {}
    run = plan_run(params, config)
    for index, (unit, plan) in enumerate(zip(run.units, run.plans, strict=True)):
        for decision in plan:
            used = decision.config if decision.kept_float is None else None
            settings |= {unit_prefix(unit, index) + name: used for name in decision.single}
    return settings


def _idle_rules(parts: Sequence[Unit], config: QuantizeConfig) -> list[str]:
    """A sentence on each rule that has no effect on the model."""
    return without_effect(
        config,
        [
            checkpoint_name(unit_prefix(unit, index) + path, unit.config.model_type)
            for index, unit in enumerate(parts)
            for stack, linear in unit.linears().items()
            for path, _ in single_linears(stack, linear)
        ],
    )


def _need_of_tokens(tune: float, used: Sequence[SolverConfig]) -> str | None:
    """What needs calibration tokens, as a phrase; None where nothing does."""
    if tune > 0:
        return f"tuning (tune={tune})"
    needing = next((settings for settings in used if _reads_hessian(settings)), None)
    return None if needing is None else f"method {needing.method!r} with scale {needing.grid_search!r}"


def _reads_hessian(settings: SolverConfig) -> bool:
    """Whether a solve reads the Hessian, if only its diagonal."""
    return method_of(settings).statistics.factor or settings.grid_search == "hessian"


def _packed_widths(parts: Sequence[Unit], plans: Sequence[Plan]) -> dict[tuple[int, SolverConfig], list[int]]:
    """The out-features of every stage that is packed, all its linears together, by the in-features that it reads and settings."""
    widths: dict[tuple[int, SolverConfig], list[int]] = {}
    for _, linears, decision in _packed_stages(parts, plans):
        total = sum(shape_of(linear)[1] for linear in linears)
        widths.setdefault((_features(linears), decision.config), []).append(total)
    return widths


def _plan_unit(unit: Unit, prefix: str, config: QuantizeConfig) -> Plan:
    """Decides stage by stage: one solve serves all linears of a stage, so one that cannot be packed keeps all float."""
    linears = unit.linears()
    return tuple(_plan_stage(stage, linears, prefix, unit.config.model_type, config) for stage in unit.stages())


def _plan_stage(
    stage: Stage, linears: Mapping[str, AnyLinear], prefix: str, architecture: str, config: QuantizeConfig
) -> StagePlan:
    single = [path for stack in stage.linears for path, _ in single_linears(stack, linears[stack])]
    full = {path: checkpoint_name(prefix + path, architecture) for path in single}
    settings = {path: resolve(config, name) for path, name in full.items()}
    agreed, *others = set(settings.values())
    if others:
        raise ConfigError(_parted(stage, settings, full, config))
    if agreed is None:
        rule = first_match(config.rules, full[single[0]])
        kept = f"skipped by rule {rule.pattern if rule else ''!r}"
        return StagePlan(stage.linears, kept, config.with_rule(None), tuple(single))
    reasons = {}
    for path in stage.linears:
        if reason := packable(*shape_of(linears[path])):
            reasons[path] = reason
    kept = "; ".join(f"{path}: {reason}" for path, reason in reasons.items())
    k, n = shape_of(linears[stage.linears[0]])
    agreed = agreed if stage.routing is not None else agreed.dense
    reads = method_of(agreed).statistics
    pulls = stage.adds and reads.drift and reads.residual and n < k
    return StagePlan(stage.linears, kept or None, agreed, tuple(single), pulls, sums_itself=stage.routing is not None)


def _parted(stage: Stage, settings: Mapping[str, SolverConfig | None], names: Mapping[str, str], config: QuantizeConfig) -> str:
    """The error message for linears of a stage that rules give different settings."""
    said = {name: _described(config, name) for name in names.values()}
    if stage.routing is not None:  # of many experts, the first for each of the settings
        said = {name: text for text, name in {text: name for name, text in reversed(said.items())}.items()}
    each = "; ".join(f"{name}: {text}" for name, text in said.items())
    why = _SERVED_AS_ONE if stage.routing is not None else _why_agree(stage.fusions, settings)
    return f"the rules give {', '.join(stage.linears)} different settings, and {why}; give them the same: {each}"


_SERVED_AS_ONE = "readers serve the experts of a layer as one matrix"


def _why_agree(fusions: Sequence[Fusion], settings: Mapping[str, SolverConfig | None]) -> str:
    """Why linears of a stage that have different settings cannot have them."""
    shared = "they read the same activations, so one solve serves them all"
    parted = [fusion for fusion in fusions if len({settings[path] for path in fusion.linears}) > 1]
    return f"{shared}, and readers fuse them into one matrix" if parted else shared


def _described(config: QuantizeConfig, name: str) -> str:
    """What the rules say of a linear, in words."""
    rule = first_match(config.rules, name)
    if rule is None:
        return "the run's settings, no rule matches"
    changes = ", ".join(f"{key}={value}" for key, value in rule.overrides.items()) or "the run's settings"
    return f"{'skipped' if rule.skip else changes} by rule {rule.pattern!r}"


def _packed_stages(parts: Sequence[Unit], plans: Sequence[Plan]) -> Iterator[tuple[str, list[AnyLinear], StagePlan]]:
    """The stages that are packed: the path of the first linear, the linears, and the stage's plan."""
    for index, (unit, plan) in enumerate(zip(parts, plans, strict=True)):
        linears = unit.linears()
        for decision in plan:
            if decision.kept_float is None:
                yield unit_prefix(unit, index) + decision.names[0], [linears[path] for path in decision.names], decision


def _features(linears: Sequence[AnyLinear]) -> int:
    """K, the features that the linears of a stage read."""
    return shape_of(linears[0])[0]


def shape_of(linear: AnyLinear) -> tuple[int, int]:
    """(K, N), for a stack those of each of its linears."""
    if isinstance(linear, ExpertLinear):
        return linear.features
    k, n = linear.kernel.get_value().shape
    return k, n
