"""A stage whose linears are stacked over experts: each expert is solved on the tokens that were routed to it.

Experts are solved in chunks, all of a chunk as one program. For each chunk the batches are read once more, so that the sums of
one chunk alone are in memory; what the experts read is in the batches already, or is a norm away.

The float model follows the routing of the quantized one (`jgptq.models.stages.Step.decides`). So each row of an expert is the
same token in both, what its inputs have drifted is defined row by row, and the methods that read the drift serve experts as
well. The target is then what the float experts would make of the tokens that they are given. The residual's shift is left out:
an expert's output is one weighted part of what a token receives, and what the stream lost is no single expert's to return.
"""

import functools
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jgptq.models import Carry, ExpertLinear, Stage, Unit
from jgptq.models.mixture.leaves import PackedExperts
from jgptq.models.mixture.routing import Routing, everyone
from jgptq.run.batches import Batch
from jgptq.run.experts.solve import Chunk, ExpertRow, experts_at_once, joined, solve_chunk
from jgptq.run.lapack import lapack_threads
from jgptq.run.plan import StagePlan
from jgptq.run.report import LinearReport
from jgptq.run.stage import Job
from jgptq.settings.solver import SolverConfig
from jgptq.solver.methods import method_of
from jgptq.solver.statistics.experts import ExpertSums, accumulate_experts, empty_experts, shrunk, with_expert


class Observed(NamedTuple):
    """A stage of experts in the two models, and the batches as they enter it."""

    work: Unit  # the block that is quantized, on the device
    reference: Unit  # the float block, on the device
    batches: Sequence[Batch]
    stage: Stage


def solve_experts(
    names: Sequence[str], observed: Observed, plan: StagePlan, job: Job
) -> tuple[dict[str, PackedExperts], list[LinearReport]]:
    """Solves the linears of all experts of a stage, and puts their expanded kernels into the block.

    Args:
      names: what reports call each linear: for each stack in the order of the stage, those of its experts.
      observed: the stage.
      plan: what happens to it.
      job: what holds for every stage of the run.

    Returns:
      The packed stacks by path, and the rows of the report.

    Raises:
      NumericalError: experts that cannot be solved; names all of a chunk.
    """
    linears = {path: linear for path, linear in observed.work.linears().items() if path in plan.names}
    stacks = [linear for linear in linears.values() if isinstance(linear, ExpertLinear)]
    experts, k = stacks[0].experts, stacks[0].features[0]
    config = plan.config
    tokens_e = _tokens(observed, experts)
    starved_e = tokens_e < max(1.0, config.min_tokens_per_feature * k) if observed.batches else np.zeros(experts, bool)
    size = experts_at_once(experts, k, sum(stack.features[1] for stack in stacks))
    layer = _layer_sums(observed, config, k, experts) if starved_e.any() and config.starved_experts == "shrink" else None
    chunks, rows = [], list[list[ExpertRow]]()
    with lapack_threads(k):
        for first in range(0, experts, size):
            started = time.monotonic()
            here = slice(first, first + size)
            total = _chunk_sums(observed, config, k, first, starved_e[here], layer) if observed.batches else None
            kernels = [jnp.asarray(stack.kernel.get_value())[here] for stack in stacks]
            chunk_names = [[names[index * experts + expert] for index in range(len(stacks))] for expert in range(experts)[here]]
            chunk = Chunk(kernels, total, tokens_e[here], starved_e[here], chunk_names)
            solved = solve_chunk(chunk, config, job.dtype, allow_rtn=job.allow_rtn_fallback)
            chunks.append(solved)
            rows.append([row._replace(seconds=(time.monotonic() - started) / size) for row in solved.rows])
    packed = {}
    for index, (path, stack) in enumerate(zip(plan.names, stacks, strict=True)):
        packed[path] = PackedExperts(joined([chunk.packed[index] for chunk in chunks]))
        stack.kernel.set_value(jnp.concatenate([chunk.kernels[index] for chunk in chunks]))
    return packed, [row.report(index) for index in range(len(stacks)) for part in rows for row in part]


def _tokens(observed: Observed, experts: int) -> np.ndarray:
    """How many tokens of all batches were routed to each expert."""
    counts = [batch.carry[observed.stage.routing].rows_e for batch in observed.batches if observed.stage.routing is not None]
    return np.sum([np.asarray(rows_e, np.int64) for rows_e in counts], axis=0) if counts else np.zeros(experts, np.int64)


def _chunk_sums(
    observed: Observed, config: SolverConfig, k: int, first: int, starved_e: np.ndarray, layer: ExpertSums | None
) -> ExpertSums:
    """The sums of consecutive experts, those of starved ones as the settings say."""
    drift = method_of(config).statistics.drift
    total = empty_experts(len(starved_e), k, drift=drift)
    for batch in observed.batches:
        total = _observe(observed.work, observed.reference, batch, total, jnp.int32(first), stage=observed.stage)
    if layer is not None:
        return _shrink(total, layer, jnp.float32(max(1.0, config.min_tokens_per_feature * k)))
    if config.starved_experts != "all_tokens":
        return total
    everything: ExpertSums | None = None
    for index in np.flatnonzero(starved_e):
        # What opens an expert reads the tokens themselves, which are the same for all of them.
        if everything is None or not observed.stage.gathers:
            everything = empty_experts(1, k, drift=drift)
            for batch in observed.batches:
                expert = jnp.int32(first + index)
                everything = _observe_all(observed.work, observed.reference, batch, everything, expert, stage=observed.stage)
        total = _replace(total, jnp.int32(index), everything)
    return total


def _layer_sums(observed: Observed, config: SolverConfig, k: int, experts: int) -> ExpertSums:
    """The sums over the rows of all experts, as those of one."""
    total = empty_experts(1, k, drift=method_of(config).statistics.drift)
    for batch in observed.batches:
        total = _observe_layer(observed.work, observed.reference, batch, total, stage=observed.stage)
    return total


_shrink = jax.jit(shrunk, donate_argnums=0)
_replace = jax.jit(with_expert, donate_argnums=0)


def _accumulate(
    work: Unit, reference: Unit, batch: Batch, total: ExpertSums, stage: Stage, expert_c: jax.Array, rows_c: jax.Array
) -> ExpertSums:
    h_pk = work.inputs(stage, batch.carry)
    followed = total.drift_ekk is not None and batch.reference is not None
    h_float_pk = reference.inputs(stage, batch.reference) if followed and batch.reference is not None else None
    return accumulate_experts(total, h_pk, h_float_pk, expert_c, rows_c)


@functools.partial(jax.jit, static_argnames="stage", donate_argnames="total")
def _observe(work: Unit, reference: Unit, batch: Batch, total: ExpertSums, first: jax.Array, *, stage: Stage) -> ExpertSums:
    """Adds a batch to the sums of the experts from `first` on."""
    routing = _routing(batch.carry, stage)
    return _accumulate(work, reference, batch, total, stage, routing.expert_c - first, routing.rows_c)


@functools.partial(jax.jit, static_argnames="stage", donate_argnames="total")
def _observe_layer(work: Unit, reference: Unit, batch: Batch, total: ExpertSums, *, stage: Stage) -> ExpertSums:
    """Adds the rows of all experts to one sum."""
    routing = _routing(batch.carry, stage)
    return _accumulate(work, reference, batch, total, stage, jnp.zeros_like(routing.expert_c), routing.rows_c)


@functools.partial(jax.jit, static_argnames="stage", donate_argnames="total")
def _observe_all(work: Unit, reference: Unit, batch: Batch, total: ExpertSums, expert: jax.Array, *, stage: Stage) -> ExpertSums:
    """Adds what an expert would read if every token were routed to it."""
    routing = _routing(batch.carry, stage)
    sent = everyone(routing.place_tk.shape[0], expert, routing.rows_e.shape[0])
    carry = _up_to(work, stage, {**batch.carry, str(stage.routing): sent})
    followed = None if batch.reference is None else _up_to(reference, stage, {**batch.reference, str(stage.routing): sent})
    return _accumulate(work, reference, Batch(carry, followed), total, stage, sent.expert_c - expert, sent.rows_c)


def _up_to(unit: Unit, stage: Stage, carry: Carry) -> Carry:
    """The carry with the branch that the stage reads made again, where a stage of experts writes it."""
    writers = (other for other in unit.stages() if other.gathers and any(step.to == stage.reads for step in other.steps))
    for writer in writers:
        carry = {**carry, **unit.run(writer, carry)}
    return carry


def _routing(carry: Mapping[str, object], stage: Stage) -> Routing:
    routing = carry[str(stage.routing)]
    assert isinstance(routing, Routing)
    return routing
