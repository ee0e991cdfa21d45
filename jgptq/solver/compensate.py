"""The blocked loop over rows: quantize, and spread the error over the rows that follow."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jgptq.config import ROW_MULTIPLE, QuantizeConfig
from jgptq.notation import Float, Int, UInt8
from jgptq.solver.grid import Grid, search_grid
from pallas_kernels import gptq_block

_MAX_BLOCK = 128
_STEP = ROW_MULTIPLE


class Compensated(NamedTuple):
    """Codes and the grids that they are of, in the solver's sequence of rows."""

    codes_kn: UInt8[jax.Array, "K N"]
    grid: Grid  # [G, N]


class _State(NamedTuple):
    """What the loops carry."""

    w_kn: jax.Array  # weights, each row current when its turn comes
    codes_kn: jax.Array  # uint8
    grid: Grid  # [G, N], filled as groups begin


def compensate(
    w_kn: Float[jax.Array, "K N"],
    u_kk: Float[jax.Array, "K K"],
    weight_k: Float[jax.Array, " K"],
    *,
    rows: int,
    config: QuantizeConfig,
    fixed: tuple[Grid, Int[jax.Array, " K"]] | None = None,
    drift_kk: Float[jax.Array, "K K"] | None = None,
) -> Compensated:
    """Quantizes rows in sequence (GPTQ, Frantar et al. 2022, algorithm 1), with lazy updates on two levels.

    Within a block of up to 128 rows errors spread after every 32, to the blocks after it once, as matmuls: what the inner steps
    touch stays in a cache.

    Args:
      w_kn: `[K, N]`, in the solver's sequence.
      u_kk: the upper factor of the damped inverse, in the same sequence.
      weight_k: the diagonal of H, for the search of scales.
      rows: rows in a group.
      config: bits, grid and search.
      fixed: grids `[G, N]` that were set beforehand, and the group of each row; None where groups are runs of the sequence, and
        each is given its grid from its rows as they are when its turn comes.
      drift_kk: GPTAQ's correction, strictly upper; None for plain GPTQ.

    Returns:
      Codes and grids.
    """
    k, n = w_kn.shape
    block = solver_block(k, rows)

    def run_step(
        step: jax.Array, carry: tuple[_State, jax.Array, jax.Array, jax.Array]
    ) -> tuple[_State, jax.Array, jax.Array, jax.Array]:
        state, error_bn, turn_bn, start = carry
        row = start + step * _STEP
        if fixed is None:
            begun = lambda: _begin_group(state, weight_k, row, rows, config)  # noqa: E731
            grid = jax.lax.cond(row % rows == 0, begun, lambda: state.grid)
            of_step = jax.tree.map(lambda part_gn: jax.lax.dynamic_slice_in_dim(part_gn, row // rows, 1), grid)
        else:
            grid = state.grid
            groups_r = jax.lax.dynamic_slice_in_dim(fixed[1], row, _STEP)
            of_step = jax.tree.map(lambda part_gn: part_gn[groups_r], grid)
        w_rn = jax.lax.dynamic_slice_in_dim(state.w_kn, row, _STEP)
        u_rr = _corner(u_kk, row, row, _STEP, _STEP)
        drift_rr = None if drift_kk is None else _corner(drift_kk, row, row, _STEP, _STEP)
        found = gptq_block(w_rn, u_rr, of_step.scale_n, of_step.zero_n, drift_rr, bits=config.bits)
        later_b = (jnp.arange(block) >= (step + 1) * _STEP)[None, :]
        w_bn = jax.lax.dynamic_slice_in_dim(state.w_kn, start, block)
        w_bn = w_bn - _spread(jnp.where(later_b, _corner(u_kk, row, start, _STEP, block), 0.0), found.error_rn)
        error_bn = jax.lax.dynamic_update_slice_in_dim(error_bn, found.error_rn, step * _STEP, 0)
        if drift_kk is not None:
            w_bn = w_bn + _spread(jnp.where(later_b, _corner(drift_kk, row, start, _STEP, block), 0.0), found.turn_rn)
            turn_bn = jax.lax.dynamic_update_slice_in_dim(turn_bn, found.turn_rn, step * _STEP, 0)
        state = _State(
            jax.lax.dynamic_update_slice_in_dim(state.w_kn, w_bn, start, 0),
            jax.lax.dynamic_update_slice_in_dim(state.codes_kn, found.codes_rn, row, 0),
            grid,
        )
        return state, error_bn, turn_bn, start

    def run_block(index: jax.Array, state: _State) -> _State:
        start = index * block
        error_bn = jnp.zeros((block, n), w_kn.dtype)
        turn_bn = jnp.zeros((block if drift_kk is not None else 0, n), w_kn.dtype)
        state, error_bn, turn_bn, _ = jax.lax.fori_loop(0, block // _STEP, run_step, (state, error_bn, turn_bn, start))

        def update(later: jax.Array, w_kn: jax.Array) -> jax.Array:
            w_bn = jax.lax.dynamic_slice_in_dim(w_kn, later * block, block)
            w_bn = w_bn - _spread(_corner(u_kk, start, later * block, block, block), error_bn)
            if drift_kk is not None:
                w_bn = w_bn + _spread(_corner(drift_kk, start, later * block, block, block), turn_bn)
            return jax.lax.dynamic_update_slice_in_dim(w_kn, w_bn, later * block, 0)

        return state._replace(w_kn=jax.lax.fori_loop(index + 1, k // block, update, state.w_kn))

    empty = Grid(jnp.ones((k // rows, n), w_kn.dtype), jnp.zeros((k // rows, n), w_kn.dtype))
    state = _State(w_kn, jnp.zeros((k, n), jnp.uint8), empty if fixed is None else fixed[0])
    state = jax.lax.fori_loop(0, k // block, run_block, state)
    return Compensated(state.codes_kn, state.grid)


def solver_block(k: int, rows: int) -> int:
    """Rows in one lazy block: the largest multiple of 32 up to 128 that divides K and holds whole groups, or lies within one."""
    fits = [b for b in range(_STEP, _MAX_BLOCK + 1, _STEP) if k % b == 0 and (b % rows == 0 or rows % b == 0)]
    return max(fits)


def _begin_group(state: _State, weight_k: jax.Array, row: jax.Array, rows: int, config: QuantizeConfig) -> Grid:
    """Sets the grid of the group that begins at `row` from its rows as they are now."""
    w_rn, weight_r = (jax.lax.dynamic_slice_in_dim(part, row, rows) for part in (state.w_kn, weight_k))
    begun = search_grid(w_rn, weight_r, bits=config.bits, sym=config.sym, scale=config.grid_search)
    group = row // rows
    return jax.tree.map(lambda all_gn, one_n: jax.lax.dynamic_update_index_in_dim(all_gn, one_n, group, 0), state.grid, begun)


def _corner(a_kk: jax.Array, row: jax.Array, column: jax.Array, height: int, width: int) -> jax.Array:
    return jax.lax.dynamic_slice(a_kk, (row, column), (height, width))


def _spread(u_rb: jax.Array, error_rn: jax.Array) -> jax.Array:
    """`u^T e`: what the errors of R rows change in B later ones."""
    return jnp.matmul(u_rb.T, error_rn, precision=jax.lax.Precision.HIGHEST)
