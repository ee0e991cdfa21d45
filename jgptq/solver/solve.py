"""One linear's solve: weights and a Hessian in, codes, scales and a diagnosis out."""

import enum
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jgptq.config import ROW_MULTIPLE, QuantizeConfig, group_rows
from jgptq.notation import Float, Int, UInt8
from jgptq.solver.cholesky import damped_inverse_factor
from jgptq.solver.grid import Grid, minmax_grid, nearest_codes
from jgptq.solver.order import file_order, group_order
from pallas_kernels import gptq_block

_MAX_BLOCK = 128
_STEP = ROW_MULTIPLE


class Outcome(enum.IntEnum):
    """What happened in a solve; `message` says it in full."""

    SOLVED = 0
    RAISED_DAMPING = 1
    ROUNDED = 2
    ZERO_HESSIAN = 3
    NOT_FACTORED = 4
    NONFINITE_HESSIAN = 5
    NONFINITE_WEIGHTS = 6
    SCALE_OVERFLOW = 7

    @property
    def failed(self) -> bool:
        """Whether the codes must not be used."""
        return self >= Outcome.ZERO_HESSIAN

    @property
    def message(self) -> str:
        """One sentence: the diagnosis, its cause and its remedy."""
        return _MESSAGES[self]


_MESSAGES = {
    Outcome.SOLVED: "Solved at the damping that was asked for.",
    Outcome.RAISED_DAMPING: "Solved only after raising the damping: the tokens span too few directions; calibrate on more.",
    Outcome.ROUNDED: "Rounded to nearest, without error compensation.",
    Outcome.ZERO_HESSIAN: "The Hessian is zero: no token reached it, or all its inputs are zero; calibrate on other text.",
    Outcome.NOT_FACTORED: "No damping makes the Hessian positive definite: the activations overflow; try dtype float32.",
    Outcome.NONFINITE_HESSIAN: "The activations hold NaN or infinity: a layer before overflows; try dtype float32.",
    Outcome.NONFINITE_WEIGHTS: "The weights hold NaN or infinity: the checkpoint is damaged; fetch it again.",
    Outcome.SCALE_OVERFLOW: "A scale is beyond the range of float16, in which files store it; check the weights.",
}


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


@functools.partial(jax.jit, static_argnames="config")
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
    rounded = round_to_nearest(w_kn, config)
    rtn_loss_n = output_loss(w_kn - rounded.dequantize(), h_kk)
    if config.method == "rtn":
        return _diagnose(rounded._replace(loss_n=rtn_loss_n, rtn_loss_n=rtn_loss_n), w_kn, h_kk)
    k, _ = w_kn.shape
    rows = group_rows(k, config.group_size)
    order = group_order(jnp.diagonal(h_kk), rows) if config.order == "group" else file_order(k, rows)
    # H is symmetric, so its rows can be gathered twice: gathers of whole rows are copies, and scatters are slow.
    permuted_kk = h_kk[order.rows_k].T[order.rows_k]
    factor = damped_inverse_factor(permuted_kk, config.damping)
    codes_kn, grid = _compensate(w_kn[order.rows_k], factor.u_kk, rows, config)
    grid = jax.tree.map(lambda part: part[jnp.argsort(order.groups_g)], grid)
    outcome = jnp.where(factor.damping > config.damping, Outcome.RAISED_DAMPING, Outcome.SOLVED)
    outcome = jnp.where(factor.finite, outcome, Outcome.NOT_FACTORED)
    solution = rounded._replace(
        codes_kn=codes_kn[jnp.argsort(order.rows_k)],
        scale_gn=grid.scale_n.astype(jnp.float16),
        zero_gn=grid.zero_n.astype(jnp.int32),
        rtn_loss_n=rtn_loss_n,
        damping=factor.damping,
        outcome=jnp.where(jnp.any(jnp.diagonal(h_kk) > 0), outcome, Outcome.ZERO_HESSIAN),
    )
    return _diagnose(solution._replace(loss_n=output_loss(w_kn - solution.dequantize(), h_kk)), w_kn, h_kk)


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
    return _diagnose(solution, w_kn, None)


def _diagnose(solution: Solution, w_kn: jax.Array, h_kk: jax.Array | None) -> Solution:
    """Overrides the outcome where the inputs or the grid are not finite."""
    outcome = solution.outcome
    if h_kk is not None:
        outcome = jnp.where(jnp.all(jnp.isfinite(h_kk)), outcome, Outcome.NONFINITE_HESSIAN)
    outcome = jnp.where(jnp.all(jnp.isfinite(solution.scale_gn)), outcome, Outcome.SCALE_OVERFLOW)
    outcome = jnp.where(jnp.all(jnp.isfinite(w_kn)), outcome, Outcome.NONFINITE_WEIGHTS)
    return solution._replace(outcome=outcome)


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


def _compensate(w_kn: jax.Array, u_kk: jax.Array, rows: int, config: QuantizeConfig) -> tuple[jax.Array, Grid]:
    """The blocked loop. Within a block, errors spread after every `_STEP` rows; to the blocks after it, once, as matmuls."""
    k, n = w_kn.shape
    block = solver_block(k, rows)

    def run_step(step: jax.Array, carry: tuple[_State, jax.Array, jax.Array]) -> tuple[_State, jax.Array, jax.Array]:
        state, error_bn, start = carry
        row = start + step * _STEP
        grid = jax.lax.cond(
            row % rows == 0,
            lambda: _begin_group(state, row, rows, config),
            lambda: state.grid,
        )
        group = row // rows
        w_rn = jax.lax.dynamic_slice_in_dim(state.w_kn, row, _STEP)
        u_rr = jax.lax.dynamic_slice(u_kk, (row, row), (_STEP, _STEP))
        found = gptq_block(w_rn, u_rr, grid.scale_n[group], grid.zero_n[group], bits=config.bits)
        u_rb = jax.lax.dynamic_slice(u_kk, (row, start), (_STEP, block))
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
        carry = (state, jnp.zeros((block, n), jnp.float32), start)
        state, error_bn, _ = jax.lax.fori_loop(0, block // _STEP, run_step, carry)

        def update(later: jax.Array, w_kn: jax.Array) -> jax.Array:
            u_bb = jax.lax.dynamic_slice(u_kk, (start, later * block), (block, block))
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
    return jax.tree.map(lambda all_gn, one_n: all_gn.at[row // rows].set(one_n), state.grid, begun)


def _spread(u_rb: jax.Array, error_rn: jax.Array) -> jax.Array:
    """`u^T e`: what the errors of R rows change in B later ones."""
    return jnp.matmul(u_rb.T, error_rn, precision=jax.lax.Precision.HIGHEST)
