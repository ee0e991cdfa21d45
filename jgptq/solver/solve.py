"""One linear's solve: weights and a Hessian in, codes, scales and a diagnosis out."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jgptq.notation import Float, Int
from jgptq.settings.sizes import group_rows
from jgptq.settings.solver import SolverConfig
from jgptq.solver.checks import checked_size, examined, factor_outcome, solver_dtype
from jgptq.solver.compensate import Compensated, Rows, compensate, solver_block
from jgptq.solver.grid import search_grid
from jgptq.solver.linalg.cholesky import (
    added_damping,
    all_finite,
    damped_factor,
    diagonal,
    diagonal_blocks,
)
from jgptq.solver.linalg.triangular import backwards, inverse_product, inverse_transposed
from jgptq.solver.order import RowOrder, in_sequence, inverse_permutation, row_order
from jgptq.solver.outcome import Outcome
from jgptq.solver.refine import SWEEPS, Refined, refine
from jgptq.solver.solution import Solution, diagnose, output_loss, round_to_nearest, undamped_loss
from jgptq.solver.target import gptaq_drift, qronos_start, shifted_target


class Prepared(NamedTuple):
    """What all columns on one Hessian share."""

    h_kk: Float[jax.Array, "K K"]  # undamped, in file order
    r_kk: Float[jax.Array, "K K"] | None  # upper factor of the damped H, last row of the sequence first; None for rtn
    u_cbb: Float[jax.Array, "C B B"] | None  # of each block of the loop, `jgptq.solver.compensate`; likewise
    drift_kk: Float[jax.Array, "K K"] | None  # 2/T X^T (X_f - X), in file order; None if the float model is not looked at
    order: RowOrder
    damping: Float[jax.Array, ""]  # fraction of the mean diagonal that was added
    outcome: Int[jax.Array, ""]  # an `Outcome`


def prepare(h_kk: Float[jax.Array, "K K"], config: SolverConfig, drift_kk: Float[jax.Array, "K K"] | None = None) -> Prepared:
    """Orders the rows of K and factors the damped Hessian once for all columns.

    Args:
      h_kk: `[K, K]`, the Hessian of `jgptq.solver.hessian`; outside of jit it is kept, not copied.
      config: group size, method, order, damping, float64.
      drift_kk: `2/T X^T (X_f - X)` for the shift of targets and the asymmetric methods; None solves without.

    Returns:
      What `solve_columns` takes.

    Raises:
      ValueError: a Hessian that is not square, or a drift of another shape.
      ConfigError: float64 is asked for where jax computes in float32 alone.
    """
    checked_size(h_kk, drift_kk)
    h_kk = jnp.asarray(h_kk, solver_dtype(config))
    drift_kk = None if drift_kk is None or config.method == "rtn" else jnp.asarray(drift_kk, h_kk.dtype)
    found = _factored(h_kk, drift_kk, config)
    return Prepared(h_kk, found.r_kk, found.u_cbb, drift_kk, found.order, found.damping, found.outcome)


class _Factored(NamedTuple):
    """What is computed of a `Prepared`: the rest is no result of this program, which would copy it."""

    r_kk: jax.Array | None
    u_cbb: jax.Array | None
    order: RowOrder
    damping: jax.Array
    outcome: jax.Array


@functools.partial(jax.jit, static_argnames="config")
def _factored(h_kk: jax.Array, drift_kk: jax.Array | None, config: SolverConfig) -> _Factored:
    k = h_kk.shape[0]
    rows = group_rows(k, config.group_size)
    diag_k = diagonal(h_kk)
    finite, symmetric = examined(h_kk)
    if config.method == "rtn":
        order = row_order("none", diag_k, rows)
        outcome = jnp.where(finite, Outcome.ROUNDED, Outcome.NONFINITE_HESSIAN)
        return _Factored(None, None, order, jnp.float32(0), outcome)
    order = row_order(config.order, diag_k, rows)
    factor = damped_factor(h_kk, config.damping, order.rows_k[::-1])
    if drift_kk is not None:
        finite = finite & all_finite(drift_kk)
    outcome = factor_outcome(factor, diag_k, config, finite=finite, symmetric=symmetric)
    r_cbb = diagonal_blocks(factor.kk, solver_block(k, rows))
    u_cbb = inverse_transposed(r_cbb[::-1, ::-1, ::-1])
    return _Factored(factor.kk, u_cbb, order, factor.damping, outcome)


@functools.partial(jax.jit, static_argnames="config")
def solve_columns(
    w_kn: Float[jax.Array, "K N"],
    prepared: Prepared,
    config: SolverConfig,
    residual_kn: Float[jax.Array, "K N"] | None = None,
) -> Solution:
    """Quantizes columns on a prepared Hessian; columns do not depend on each other, so any slice of a kernel may be given.

    Args:
      w_kn: `[K, N]`, in file order; K a multiple of the group size.
      prepared: from `prepare`, with the same config; a config of method "rtn" takes any.
      config: bits, group size, grid, method.
      residual_kn: `2/T X^T D`, with D what the residual stream lost before these columns' outputs are added to it; or None.

    Returns:
      The solution, without the loss of round-to-nearest; check `outcome` before use.

    Raises:
      ValueError: the Hessian was prepared for round-to-nearest, or without the drift that the method reads.
    """
    return _solved(w_kn, prepared, config, residual_kn)[0]


@functools.partial(jax.jit, static_argnames="config")
def judge_columns(
    w_kn: Float[jax.Array, "K N"],
    prepared: Prepared,
    config: SolverConfig,
    residual_kn: Float[jax.Array, "K N"] | None = None,
) -> Solution:
    """`solve_columns`, and what round-to-nearest would lose on the same columns against the same target: K^2 N/2 more
    multiplications.

    Args, Returns, Raises: those of `solve_columns`; `rtn_loss_n` is there as well.
    """
    solution, target_kn = _solved(w_kn, prepared, config, residual_kn)
    if config.method == "rtn":
        return solution._replace(rtn_loss_n=solution.loss_n)
    rounded = round_to_nearest(w_kn.astype(target_kn.dtype), config, diagonal(prepared.h_kk))
    return solution._replace(rtn_loss_n=output_loss(_lost(target_kn, rounded), prepared.h_kk))


def _solved(
    w_kn: jax.Array, prepared: Prepared, config: SolverConfig, residual_kn: jax.Array | None
) -> tuple[Solution, jax.Array]:
    """The solution and its target."""
    w_kn = w_kn.astype(prepared.h_kk.dtype)
    rows = group_rows(w_kn.shape[0], config.group_size)
    diag_k = diagonal(prepared.h_kk)
    if config.method == "rtn":
        rounded = round_to_nearest(w_kn, config, diag_k)
        outcome = jnp.where(prepared.outcome == Outcome.NONFINITE_HESSIAN, prepared.outcome, rounded.outcome)
        rounded = rounded._replace(loss_n=output_loss(_lost(w_kn, rounded), prepared.h_kk), outcome=outcome)
        return diagnose(rounded, w_kn), w_kn
    if prepared.r_kk is None:
        raise ValueError("the Hessian was prepared for round-to-nearest; prepare it with the config of this solve")
    target_kn = _target(w_kn, prepared, config, None if residual_kn is None else residual_kn.astype(w_kn.dtype))
    found = _compensated(w_kn, target_kn, prepared, config)
    solution = in_file_order(_improved(found, target_kn, prepared, rows, config), prepared.order, rows, config)
    if config.method == "gptq" and not config.improves:
        loss_n = undamped_loss(found, added_damping(diag_k, prepared.damping))
    else:
        loss_n = output_loss(_lost(target_kn, solution), prepared.h_kk)
    solution = solution._replace(loss_n=loss_n, damping=prepared.damping, outcome=prepared.outcome)
    return diagnose(solution, w_kn), target_kn


def _lost(target_kn: jax.Array, solution: Solution) -> jax.Array:
    return target_kn - solution.dequantize().astype(target_kn.dtype)


def solve(
    w_kn: Float[jax.Array, "K N"],
    h_kk: Float[jax.Array, "K K"],
    config: SolverConfig,
    *,
    drift_kk: Float[jax.Array, "K K"] | None = None,
    residual_kn: Float[jax.Array, "K N"] | None = None,
) -> Solution:
    """Quantizes a kernel so that its output error `tr((W - Q)^T H (W - Q))` is small (GPTQ, Frantar et al. 2022, algorithm 1).

    Rows are quantized in sequence; the error of each is spread over the rows after it, `w_j -= u[k, j] e_k`, with `H^-1 = U^T U`
    (`jgptq.solver.compensate` says how that is done without U).
    A group's grid is set from its rows as they are when its turn comes. Linears that share H are solved at once: put them side by
    side. Where a drift or a residual is given, W is the shifted target of `jgptq.solver.target`.

    Args:
      w_kn: `[K, N]`; K a multiple of the group size.
      h_kk: `[K, K]`, the Hessian of `jgptq.solver.hessian`.
      config: bits, group size, grid, method, order, damping.
      drift_kk: `2/T X^T (X_f - X)`, or None.
      residual_kn: `2/T X^T D`, or None.

    Returns:
      The solution; check `outcome` before use.

    Raises:
      ValueError: shapes that do not agree, or a method that needs a drift and has none.
    """
    if w_kn.shape[0] != h_kk.shape[0]:
        raise ValueError(f"the kernel {list(w_kn.shape)} and the Hessian {list(h_kk.shape)} differ in K")
    return judge_columns(w_kn, prepare(h_kk, config, drift_kk), config, residual_kn)


solve_many = jax.jit(jax.vmap(solve, in_axes=(0, 0, None)), static_argnums=2)
"""`solve` for a batch of problems of one shape, such as the experts of a layer: kernels `[E, K, N]` on Hessians `[E, K, K]`."""


def _target(w_kn: jax.Array, prepared: Prepared, config: SolverConfig, residual_kn: jax.Array | None) -> jax.Array:
    if config.method in ("gptaq", "qronos") and prepared.drift_kk is None:
        raise ValueError(f"method {config.method!r} needs the drift of the inputs: give drift_kk to prepare")
    residual_kn = residual_kn if config.shifts_residual else None
    r_kk, factored_k = prepared.r_kk, prepared.order.rows_k[::-1]
    if r_kk is None or (prepared.drift_kk is None and residual_kn is None):
        return w_kn

    def inverse_times(b_kn: jax.Array) -> jax.Array:
        return inverse_product(r_kk, b_kn[factored_k])[inverse_permutation(factored_k)]

    return shifted_target(w_kn, inverse_times, prepared.drift_kk, residual_kn, config.target_shift, config.residual_shift)


def _compensated(w_kn: jax.Array, target_kn: jax.Array, prepared: Prepared, config: SolverConfig) -> Compensated:
    """Runs the loop of the method, in the solver's sequence."""
    r_kk, u_cbb, drift_kk, rows_k = prepared.r_kk, prepared.u_cbb, prepared.drift_kk, prepared.order.rows_k
    assert r_kk is not None
    assert u_cbb is not None
    k = r_kk.shape[0]

    def l_rows(start: jax.Array, size: int) -> jax.Array:
        return backwards(jax.lax.dynamic_slice_in_dim(r_kk, k - size - start, size))

    start_kn, drift_rows = target_kn[rows_k], None
    if config.method == "gptaq" and drift_kk is not None:
        p_kk = gptaq_drift(backwards(r_kk), in_sequence(drift_kk, rows_k), config.target_shift)
        start_kn, drift_rows = w_kn[rows_k], functools.partial(jax.lax.dynamic_slice_in_dim, p_kk)
    if config.method == "qronos" and drift_kk is not None:
        h_kk, drift_kk = in_sequence(prepared.h_kk, rows_k), in_sequence(drift_kk, rows_k)
        start_kn = qronos_start(w_kn[rows_k], start_kn, backwards(r_kk), h_kk, drift_kk, config.target_shift)
    return quantize_rows(start_kn, l_rows, u_cbb, diagonal(prepared.h_kk)[rows_k], prepared.order, config, drift_rows)


def quantize_rows(
    start_kn: Float[jax.Array, "K N"],
    l_rows: Rows,
    u_cbb: Float[jax.Array, "C B B"],
    diag_k: Float[jax.Array, " K"],
    order: RowOrder,
    config: SolverConfig,
    drift_rows: Rows | None = None,
) -> Compensated:
    """Runs the loop over rows, on grids that are set on the way or, for static order, beforehand in the groups of the file.

    Args:
      start_kn: what the loop begins with, in the solver's sequence.
      l_rows: rows of the lower factor of the damped Hessian.
      u_cbb: the inverses of its blocks along the diagonal, transposed.
      diag_k: the diagonal of H, in the same sequence.
      order: that sequence.
      config: bits, group size, order, grid.
      drift_rows: rows of GPTAQ's matrix transposed, or None.
    """
    k, n = start_kn.shape
    rows = group_rows(k, config.group_size)
    fixed = None
    if config.order == "static":
        to_file_k = inverse_permutation(order.rows_k)
        grouped = start_kn[to_file_k].reshape(-1, rows, n), diag_k[to_file_k].reshape(-1, rows)
        grid = search_grid(*grouped, bits=config.bits, sym=config.sym, scale=config.grid_search)
        fixed = grid, order.rows_k // rows
    return compensate(start_kn, l_rows, u_cbb, diag_k, rows=rows, config=config, fixed=fixed, drift_rows=drift_rows)


def _improved(found: Compensated, target_kn: jax.Array, prepared: Prepared, rows: int, config: SolverConfig) -> Refined:
    """Re-fits and refines, in a sequence whose groups are runs: the solver's own, or the file's for static order."""
    codes_kn = found.codes_kn.astype(target_kn.dtype)
    if not config.improves:
        return Refined(codes_kn, found.grid)
    rounds, sweeps = (config.refine, SWEEPS) if config.refine else (1, 0)
    # The target is that of the damped least squares: without the damping, directions that hardly any token spans would be
    # fitted to those few.
    k, rows_k = target_kn.shape[0], prepared.order.rows_k
    h_kk = prepared.h_kk + added_damping(diagonal(prepared.h_kk), prepared.damping) * jnp.eye(k, dtype=target_kn.dtype)
    improve = functools.partial(refine, rows=rows, rounds=rounds, sweeps=sweeps, bits=config.bits, sym=config.sym)
    if config.order != "static":
        return improve(codes_kn, found.grid, target_kn[rows_k], in_sequence(h_kk, rows_k))
    better = improve(codes_kn[inverse_permutation(rows_k)], found.grid, target_kn, h_kk)
    return better._replace(codes_kn=better.codes_kn[rows_k])


def in_file_order(found: Refined | Compensated, order: RowOrder, rows: int, config: SolverConfig) -> Solution:
    """Puts rows and groups where the file has them."""
    to_file_k, groups_g = inverse_permutation(order.rows_k), inverse_permutation(order.groups_g)
    return Solution(
        codes_kn=found.codes_kn[to_file_k].astype(jnp.uint8),
        scale_gn=found.grid.scale_n[groups_g].astype(jnp.float16),
        zero_gn=found.grid.zero_n[groups_g].astype(jnp.int32),
        group_k=(to_file_k // rows).astype(jnp.int32) if config.order == "desc_act" else None,
        loss_n=jnp.full((found.codes_kn.shape[1],), jnp.nan, jnp.float32),
        rtn_loss_n=None,
        damping=jnp.float32(0),
        outcome=jnp.int32(Outcome.SOLVED),
    )
