"""A stage solved: its linears packed, its failures diagnosed, its rows of the report."""

import dataclasses
import time
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from jgptq.errors import NumericalError
from jgptq.models import Expert, Linear
from jgptq.models.packed import PackedTensor
from jgptq.run.lapack import lapack_threads
from jgptq.run.report import KEPT_FLOAT, LinearReport
from jgptq.run.tiles import PreparedStage, SolvedLinear, SolvedStage, prepare_stage, solve_stage
from jgptq.settings.solver import SolverConfig
from jgptq.solver import Outcome, Placement
from jgptq.solver.statistics.drift import StageSums


@dataclasses.dataclass(frozen=True)
class Job:
    """What holds for every stage of a run."""

    dtype: jnp.dtype  # that activations and expanded kernels are computed in
    columns: Mapping[tuple[int, SolverConfig], int]  # K, a stage's settings -> columns that are solved at once
    placement: Placement  # where sums and factors lie
    allow_rtn_fallback: bool


def solve_linears(
    names: Sequence[str], linears: Mapping[str, Linear], total: StageSums | None, config: SolverConfig, job: Job
) -> tuple[dict[str, PackedTensor], list[LinearReport]]:
    """Solves the linears of a stage, and puts their expanded kernels into the block that the stage is of."""
    started = time.monotonic()
    tokens = 0 if total is None else int(total.hessian.tokens)
    k = next(iter(linears.values())).kernel.get_value().shape[0]
    with lapack_threads(k):
        prepared = None if total is None else prepare_stage(total, config, job.placement)
        solved, note = _solve_checked(names, list(linears.values()), prepared, config, job)
    seconds = time.monotonic() - started
    width = sum(result.packed.shape[1] for result in solved.linears)
    packed, rows = {}, []
    for (path, linear), name, result, kernel in zip(linears.items(), names, solved.linears, solved.kernels, strict=True):
        packed[path] = result.packed
        linear.kernel.set_value(kernel)
        rows.append(_row(name, solved, result, note, tokens, seconds * result.packed.shape[1] / width))
    return packed, rows


def _solve_checked(
    names: Sequence[str], linears: Sequence[Linear], prepared: PreparedStage | None, config: SolverConfig, job: Job
) -> tuple[SolvedStage, str]:
    """A usable solution and what there is to say of it; a failed solve is an error, unless the caller allowed rounding."""
    kernels = tuple(jnp.asarray(linear.kernel.get_value()) for linear in linears)
    columns = job.columns[kernels[0].shape[0], config]

    def solve(used: SolverConfig) -> SolvedStage:
        return solve_stage(kernels, prepared, used, columns=columns, dtype=job.dtype)

    solved = solve(config)
    outcome = Outcome(int(solved.outcome))
    if not outcome.failed:
        return solved, "" if outcome in (Outcome.SOLVED, Outcome.ROUNDED) else outcome.message
    rescuable = outcome in (Outcome.ZERO_HESSIAN, Outcome.NOT_FACTORED)
    if rescuable and job.allow_rtn_fallback:
        return solve(dataclasses.replace(config, method="rtn")), outcome.message
    hint = " To round such linears to nearest instead, pass allow_rtn_fallback=True (--allow-rtn-fallback)." if rescuable else ""
    raise NumericalError(f"{', '.join(names)}: {outcome.message}{hint}")


def _row(name: str, stage: SolvedStage, result: SolvedLinear, note: str, tokens: int, seconds: float) -> LinearReport:
    k, n = result.packed.shape
    outcome = Outcome(int(stage.outcome)).name
    if tokens == 0:
        return LinearReport(name=name, k=k, n=n, outcome=outcome, bits=result.packed.bits, note=note, seconds=seconds)
    loss, rtn_loss = (float(np.asarray(part, np.float64).sum()) for part in (result.loss_n, result.rtn_loss_n))
    damping = float(stage.damping)
    if loss > rtn_loss:
        note = f"{note} The loss is above that of round-to-nearest.".strip()
    return LinearReport(
        name=name,
        k=k,
        n=n,
        outcome=outcome,
        bits=result.packed.bits,
        note=note,
        loss=loss,
        rtn_loss=rtn_loss,
        damping=damping,
        tokens=tokens,
        seconds=seconds,
    )


def kept_row(name: str, linear: Linear | Expert, reason: str) -> LinearReport:
    """The row of a linear that stays float."""
    k, n = linear.kernel.get_value().shape
    return LinearReport(name=name, k=k, n=n, outcome=KEPT_FLOAT, note=f"Stays float: {reason}.")
