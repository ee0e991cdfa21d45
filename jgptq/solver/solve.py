"""One linear's solve: weights and a Hessian in, codes, scales and a diagnosis out."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jgptq.config import ROW_MULTIPLE, QuantizeConfig, group_rows
from jgptq.notation import Bool, Float, Int, UInt8
from jgptq.solver.cholesky import Factor, all_finite, damped_inverse_factor, diagonal
from jgptq.solver.grid import Grid, minmax_grid, nearest_codes
from jgptq.solver.order import RowOrder, file_order, group_order, inverse_permutation
from jgptq.solver.outcome import Outcome
from pallas_kernels import gptq_block

_MAX_BLOCK = 128
_STEP = ROW_MULTIPLE


class Solution(NamedTuple):
    """The quantized linear, in file order."""

    codes_kn: UInt8[jax.Array, "K N"]  # unsigned codes
    scale_gn: Float[jax.Array, "G N"]  # float16
    zero_gn: Int[jax.Array, "G N"]  # int32
    loss_n: Float[jax.Array, " N"]  # dW^T H dW of each column, with the undamped H
    rtn_loss_n: Float[jax.Array, " N"]  # the same for round-to-nearest on the same kind of grid
    damping: Float[jax.Array, ""]  # fraction of the mean diagonal that was added
    outcome: Int[jax.Array, ""]  # an `Outcome`

    def dequantize(self) -> Float[jax.Array, "K N"]:
        """`scale * (code - zero)`, float32."""
        k, n = self.codes_kn.shape
        codes_grn = self.codes_kn.astype(jnp.int32).reshape(self.scale_gn.shape[0], -1, n)
        scale_gn = self.scale_gn.astype(jnp.float32)
        return ((codes_grn - self.zero_gn[:, None, :]).astype(jnp.float32) * scale_gn[:, None, :]).reshape(k, n)


class Prepared(NamedTuple):
    """What all columns on one Hessian share. Rows and columns of K stand in the solver's sequence."""

    h_kk: Float[jax.Array, "K K"]  # undamped
    u_kk: Float[jax.Array, "K K"] | None  # upper factor of the damped inverse; None for round-to-nearest
    order: RowOrder
    damping: Float[jax.Array, ""]  # fraction of the mean diagonal that was added
    outcome: Int[jax.Array, ""]  # an `Outcome`


@functools.partial(jax.jit, static_argnames="config")
def prepare(h_kk: Float[jax.Array, "K K"], config: QuantizeConfig) -> Prepared:
    """Orders the rows of K and factors the damped inverse Hessian, `H^-1 = U^T U`, once for all columns.

    Args:
      h_kk: float32 `[K, K]`, the Hessian of `jgptq.solver.hessian`.
      config: group size, method, order, damping.

    Returns:
      What `solve_columns` takes.
    """
    k, _ = h_kk.shape
    rows = group_rows(k, config.group_size)
    diag_k = diagonal(h_kk)
    finite = all_finite(h_kk)
    if config.method == "rtn":
        outcome = jnp.where(finite, Outcome.ROUNDED, Outcome.NONFINITE_HESSIAN)
        return Prepared(h_kk, None, file_order(k, rows), jnp.float32(0), outcome)
    order = row_order(diag_k, config)
    sequence_kk = h_kk[order.rows_k[:, None], order.rows_k[None, :]]
    factor = damped_inverse_factor(sequence_kk, config.damping)
    outcome = factor_outcome(factor, diag_k, finite, config)
    return Prepared(sequence_kk, factor.u_kk, order, factor.damping, outcome)


def row_order(diag_k: Float[jax.Array, " K"], config: QuantizeConfig) -> RowOrder:
    """The sequence in which a config quantizes the rows of a Hessian with this diagonal."""
    rows = group_rows(diag_k.shape[0], config.group_size)
    return group_order(diag_k, rows) if config.order == "group" else file_order(diag_k.shape[0], rows)


def factor_outcome(
    factor: Factor, diag_k: Float[jax.Array, " K"], finite: Bool[jax.Array, ""], config: QuantizeConfig
) -> Int[jax.Array, ""]:
    """The `Outcome` of a factorization, given the Hessian's diagonal and whether all of the Hessian is finite."""
    outcome = jnp.where(factor.damping > config.damping, Outcome.RAISED_DAMPING, Outcome.SOLVED)
    outcome = jnp.where(factor.finite, outcome, Outcome.NOT_FACTORED)
    outcome = jnp.where(jnp.any(diag_k > 0), outcome, Outcome.ZERO_HESSIAN)
    return jnp.where(finite, outcome, Outcome.NONFINITE_HESSIAN)


@functools.partial(jax.jit, static_argnames="config")
def solve_columns(w_kn: Float[jax.Array, "K N"], prepared: Prepared, config: QuantizeConfig) -> Solution:
    """Quantizes columns on a prepared Hessian; columns do not depend on each other, so any slice of a kernel may be given.

    Args:
      w_kn: float32 `[K, N]`, in file order; K a multiple of the group size.
      prepared: from `prepare`, with the same config; a config of method "rtn" takes any.
      config: bits, group size, grid, method.

    Returns:
      The solution; check `outcome` before use.
    """
    rows_k = prepared.order.rows_k
    rounded = round_to_nearest(w_kn, config)
    rtn_loss_n = output_loss((w_kn - rounded.dequantize())[rows_k], prepared.h_kk)
    if config.method == "rtn":
        outcome = jnp.where(prepared.outcome == Outcome.NONFINITE_HESSIAN, prepared.outcome, rounded.outcome)
        return diagnose(rounded._replace(loss_n=rtn_loss_n, rtn_loss_n=rtn_loss_n, outcome=outcome), w_kn)
    if prepared.u_kk is None:
        raise ValueError("the Hessian was prepared for round-to-nearest; prepare it with the config of this solve")
    rows = group_rows(w_kn.shape[0], config.group_size)
    sequence_kn = w_kn[rows_k]
    u_rows = functools.partial(jax.lax.dynamic_slice_in_dim, prepared.u_kk)
    codes_kn, grid = compensate(sequence_kn, u_rows, rows, config)
    found = Solution(
        codes_kn=codes_kn,
        scale_gn=grid.scale_n.astype(jnp.float16),
        zero_gn=grid.zero_n.astype(jnp.int32),
        loss_n=rtn_loss_n,
        rtn_loss_n=rtn_loss_n,
        damping=prepared.damping,
        outcome=prepared.outcome,
    )
    found = found._replace(loss_n=output_loss(sequence_kn - found.dequantize(), prepared.h_kk))
    return diagnose(in_file_order(found, prepared.order), w_kn)


def solve(w_kn: Float[jax.Array, "K N"], h_kk: Float[jax.Array, "K K"], config: QuantizeConfig) -> Solution:
    """Quantizes a kernel so that its output error `tr((W - Q)^T H (W - Q))` is small (GPTQ, Frantar et al. 2022, algorithm 1).

    Rows are quantized in sequence; the error of each is spread over the rows after it, `w_j -= u[k, j] e_k`, with `H^-1 = U^T U`.
    A group's grid is set from its rows as they are when its turn comes. Linears that share H are solved at once: put them side by
    side.

    Args:
      w_kn: float32 `[K, N]`; K a multiple of the group size.
      h_kk: float32 `[K, K]`, the Hessian of `jgptq.solver.hessian`.
      config: bits, group size, grid, method, order, damping.

    Returns:
      The solution; check `outcome` before use.
    """
    return solve_columns(w_kn, prepare(h_kk, config), config)


def in_file_order(found: Solution, order: RowOrder) -> Solution:
    """Puts rows and groups back where the file has them."""
    rows_k, groups_g = inverse_permutation(order.rows_k), inverse_permutation(order.groups_g)
    codes_kn, scale_gn, zero_gn = found.codes_kn[rows_k], found.scale_gn[groups_g], found.zero_gn[groups_g]
    return found._replace(codes_kn=codes_kn, scale_gn=scale_gn, zero_gn=zero_gn)


@functools.partial(jax.jit, static_argnames="config")
def round_to_nearest(w_kn: Float[jax.Array, "K N"], config: QuantizeConfig) -> Solution:
    """Rounds every weight to the nearest point of its group's grid: the baseline, which needs no Hessian.

    Args:
      w_kn: float32 `[K, N]`; K a multiple of the group size.
      config: bits, group size and grid.

    Returns:
      The solution; its losses are NaN, for they cannot be known without a Hessian.
    """
    w_grn = w_kn.reshape(-1, group_rows(w_kn.shape[0], config.group_size), w_kn.shape[1])
    grid = minmax_grid(w_grn, config.bits, config.sym)
    unknown_n = jnp.full((w_kn.shape[1],), jnp.nan, jnp.float32)
    solution = Solution(
        codes_kn=nearest_codes(w_grn, grid, config.bits).astype(jnp.uint8).reshape(w_kn.shape),
        scale_gn=grid.scale_n.astype(jnp.float16),
        zero_gn=grid.zero_n.astype(jnp.int32),
        loss_n=unknown_n,
        rtn_loss_n=unknown_n,
        damping=jnp.float32(0),
        outcome=jnp.int32(Outcome.ROUNDED),
    )
    return diagnose(solution, w_kn)


def diagnose(solution: Solution, w_kn: jax.Array) -> Solution:
    """Overrides the outcome where the weights or the grid are not finite."""
    outcome = jnp.where(all_finite(solution.scale_gn.astype(jnp.float32)), solution.outcome, Outcome.SCALE_OVERFLOW)
    return solution._replace(outcome=jnp.where(all_finite(w_kn), outcome, Outcome.NONFINITE_WEIGHTS))


def output_loss(dw_kn: Float[jax.Array, "K N"], h_kk: Float[jax.Array, "K K"]) -> Float[jax.Array, " N"]:
    """`dW^T H dW` of each column: the mean squared change of its output over the calibration tokens, times two."""
    return jnp.sum(dw_kn * jnp.matmul(h_kk, dw_kn, precision=jax.lax.Precision.HIGHEST), axis=0)


def solver_block(k: int, rows: int) -> int:
    """Rows in one lazy block: the largest multiple of 32 up to 128 that divides K and holds whole groups, or lies within one."""
    fits = [b for b in range(_STEP, _MAX_BLOCK + 1, _STEP) if k % b == 0 and (b % rows == 0 or rows % b == 0)]
    return max(fits)


class _State(NamedTuple):
    """What the loops carry, in the solver's sequence of rows."""

    w_kn: jax.Array  # weights, each row current when its turn comes
    codes_kn: jax.Array  # uint8
    grid: Grid  # [G, N], filled as groups begin


def compensate(
    w_kn: Float[jax.Array, "K N"],
    u_rows: Callable[[jax.Array, int], Float[jax.Array, "B K"]],
    rows: int,
    config: QuantizeConfig,
) -> tuple[UInt8[jax.Array, "K N"], Grid]:
    """The blocked loop. Within a block, errors spread after every `_STEP` rows; to the blocks after it, once, as matmuls.

    Args:
      w_kn: float32 `[K, N]`, in the solver's sequence of rows.
      u_rows: given a start and a size, those rows of the factor U, all K columns: U itself may lie elsewhere.
      rows: rows in a group.
      config: bits and grid.

    Returns:
      The codes, and the grids of the groups, in sequence.
    """
    k, n = w_kn.shape
    block = solver_block(k, rows)

    def run_step(
        step: jax.Array, carry: tuple[_State, jax.Array, jax.Array], u_bk: jax.Array
    ) -> tuple[_State, jax.Array, jax.Array]:
        state, error_bn, start = carry
        row = start + step * _STEP
        grid = jax.lax.cond(
            row % rows == 0,
            lambda: _begin_group(state, row, rows, config),
            lambda: state.grid,
        )
        group = row // rows
        w_rn = jax.lax.dynamic_slice_in_dim(state.w_kn, row, _STEP)
        u_rr = jax.lax.dynamic_slice(u_bk, (step * _STEP, row), (_STEP, _STEP))
        found = gptq_block(w_rn, u_rr, grid.scale_n[group], grid.zero_n[group], bits=config.bits)
        u_rb = jax.lax.dynamic_slice(u_bk, (step * _STEP, start), (_STEP, block))
        later_rb = jnp.where(jnp.arange(block)[None, :] >= (step + 1) * _STEP, u_rb, 0.0)
        w_bn = jax.lax.dynamic_slice_in_dim(state.w_kn, start, block) - _spread(later_rb, found.error_rn)
        state = _State(
            jax.lax.dynamic_update_slice_in_dim(state.w_kn, w_bn, start, 0),
            jax.lax.dynamic_update_slice_in_dim(state.codes_kn, found.codes_rn, row, 0),
            grid,
        )
        return state, jax.lax.dynamic_update_slice_in_dim(error_bn, found.error_rn, step * _STEP, 0), start

    def run_block(index: jax.Array, state: _State) -> _State:
        start = index * block
        u_bk = u_rows(start, block)
        carry = (state, jnp.zeros((block, n), jnp.float32), start)
        state, error_bn, _ = jax.lax.fori_loop(0, block // _STEP, functools.partial(run_step, u_bk=u_bk), carry)

        def update(later: jax.Array, w_kn: jax.Array) -> jax.Array:
            u_bb = jax.lax.dynamic_slice(u_bk, (0, later * block), (block, block))
            w_bn = jax.lax.dynamic_slice_in_dim(w_kn, later * block, block) - _spread(u_bb, error_bn)
            return jax.lax.dynamic_update_slice_in_dim(w_kn, w_bn, later * block, 0)

        return state._replace(w_kn=jax.lax.fori_loop(index + 1, k // block, update, state.w_kn))

    empty = Grid(jnp.ones((k // rows, n), jnp.float32), jnp.zeros((k // rows, n), jnp.float32))
    state = _State(w_kn, jnp.zeros((k, n), jnp.uint8), empty)
    state = jax.lax.fori_loop(0, k // block, run_block, state)
    return state.codes_kn, state.grid


def _begin_group(state: _State, row: jax.Array, rows: int, config: QuantizeConfig) -> Grid:
    """Sets the grid of the group that begins at `row` from its rows as they are now."""
    begun = minmax_grid(jax.lax.dynamic_slice_in_dim(state.w_kn, row, rows), config.bits, config.sym)
    group = row // rows
    return jax.tree.map(lambda all_gn, one_n: jax.lax.dynamic_update_index_in_dim(all_gn, one_n, group, 0), state.grid, begun)


def _spread(u_rb: jax.Array, error_rn: jax.Array) -> jax.Array:
    """`u^T e`: what the errors of R rows change in B later ones."""
    return jnp.matmul(u_rb.T, error_rn, precision=jax.lax.Precision.HIGHEST)
