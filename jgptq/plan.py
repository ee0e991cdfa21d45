"""Which linears of a decoder a run packs, which stay float and why, decided from shapes alone before anything is read."""

import dataclasses

from jgptq.config import QuantizeConfig, fitting_group_sizes, group_rows, packable
from jgptq.errors import ConfigError
from jgptq.models import Block, Decoder


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """What happens to one stage of a block."""

    names: tuple[str, ...]  # dotted paths of its linears within the block
    kept_float: str | None  # the reason why all of them stay float, or None: all are packed


def plan_block(block: Block) -> tuple[StagePlan, ...]:
    """Decides stage by stage: the linears of a stage are fused when served, so one that cannot be packed keeps all float."""
    plans = []
    for stage in block.stages():
        reasons = {}
        for name, linear in zip(stage.names, stage.linears, strict=True):
            k, n = linear.kernel.get_value().shape
            if reason := packable(k, n):
                reasons[name] = reason
        kept = "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or None
        plans.append(StagePlan(stage.names, kept))
    return tuple(plans)


def plan_decoder(params: Decoder, config: QuantizeConfig) -> list[tuple[StagePlan, ...]]:
    """The plan of every block, checked against the group size.

    Args:
      params: the decoder; only shapes of its leaves are looked at.
      config: the run's settings.

    Returns:
      A plan for each block.

    Raises:
      ConfigError: a linear that would be packed has a K that the group size does not divide, or no linear can be packed.
    """
    plans = [plan_block(block) for block in params.layers]
    sizes: dict[int, str] = {}
    for index, (block, plan) in enumerate(zip(params.layers, plans, strict=True)):
        for stage, decision in zip(block.stages(), plan, strict=True):
            if decision.kept_float is None:
                path = f"layers.{index}.{stage.names[0]}"
                sizes.setdefault(stage.linears[0].kernel.get_value().shape[0], path)
    if not sizes:
        raise ConfigError(f"no linear can be packed: {plans[0][0].kept_float if plans else 'the decoder has no blocks'}")
    unfit = [f"{path} has K={k}" for k, path in sizes.items() if k % group_rows(k, config.group_size)]
    if unfit:
        fitting = ", ".join(str(size) for size in fitting_group_sizes(list(sizes)))
        raise ConfigError(
            f"group_size {config.group_size} does not divide K: {'; '.join(unfit)}. Sizes that fit every linear: {fitting}"
        )
    return plans


def packed_widths(params: Decoder, plans: list[tuple[StagePlan, ...]]) -> dict[int, list[int]]:
    """The out-features of every stage that is packed, all its linears together, by the in-features that the stage reads."""
    widths: dict[int, list[int]] = {}
    for block, plan in zip(params.layers, plans, strict=True):
        for stage, decision in zip(block.stages(), plan, strict=True):
            if decision.kept_float is None:
                shapes = [linear.kernel.get_value().shape for linear in stage.linears]
                widths.setdefault(shapes[0][0], []).append(sum(n for _, n in shapes))
    return widths
