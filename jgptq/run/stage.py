"""A stage solved: its linears packed, its failures diagnosed, its rows of the report."""

import dataclasses
import time
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from jgptq.errors import NumericalError
from jgptq.models import Expert, Linear
from jgptq.models.packed import PackedTensor
from jgptq.notation import Array
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
    names: Sequence[str],
    linears: Mapping[str, Linear],
    total: StageSums | None,
    config: SolverConfig,
    job: Job,
    *,
    pulled: bool = False,
) -> tuple[dict[str, PackedTensor], list[LinearReport]]:
    """Solves the linears of a stage, and puts their expanded kernels into the block that the stage is of. Where the sums were
    observed with a pull, `pulled` says so."""
    kernels = [linear.kernel.get_value() for linear in linears.values()]
    solved, rows = solve_kernels(names, kernels, total, config, job, pulled=pulled)
    for linear, kernel in zip(linears.values(), solved.kernels, strict=True):
        linear.kernel.set_value(kernel)
    return {path: result.packed for path, result in zip(linears, solved.linears, strict=True)}, rows


def solve_kernels(
    names: Sequence[str],
    kernels: Sequence[Array],
    total: StageSums | None,
    config: SolverConfig,
    job: Job,
    *,
    pulled: bool = False,
) -> tuple[SolvedStage, list[LinearReport]]:
    """Solves kernels `[K, N_i]` that read the same activations; a failed solve is an error that names them."""
    started = time.monotonic()
    tokens = 0 if total is None else int(total.hessian.tokens)
    with lapack_threads(kernels[0].shape[0]):
        prepared = None if total is None else prepare_stage(total, config, job.placement, pulled=pulled)
        solved, note = _solve_checked(names, kernels, prepared, config, job)
    seconds = time.monotonic() - started
    width = sum(result.packed.shape[1] for result in solved.linears)
    rows = [
        _row(name, solved, result, note, tokens, seconds * result.packed.shape[1] / width)
        for name, result in zip(names, solved.linears, strict=True)
    ]
    return solved, rows


def _solve_checked(
    names: Sequence[str], given: Sequence[Array], prepared: PreparedStage | None, config: SolverConfig, job: Job
) -> tuple[SolvedStage, str]:
    """A usable solution and what there is to say of it; a failed solve is an error, unless the caller allowed rounding."""
    kernels = tuple(jnp.asarray(kernel) for kernel in given)
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
