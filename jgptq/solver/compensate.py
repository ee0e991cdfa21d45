"""The blocked loop over rows: quantize, and spread the error over the rows that follow."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jgptq.config import ROW_MULTIPLE, QuantizeConfig
from jgptq.notation import Float, Int, UInt8
from jgptq.solver.grid import Grid, search_grid
from jgptq.solver.triangular import product, transposed
from pallas_kernels import gptq_block

_MAX_BLOCK = 128
_STEP = ROW_MULTIPLE


_Factors = tuple[jax.Array, ...]  # rows of U in a block [B, K], and of GPTAQ's matrix where there is one
_Moved = tuple[jax.Array, ...]  # what they multiply: errors [B, N], and rows as they were when their turn came


class Compensated(NamedTuple):
    """Codes and the grids that they are of, in the solver's sequence of rows."""

    codes_kn: UInt8[jax.Array, "K N"]
    grid: Grid  # [G, N]
    loss_n: Float[jax.Array, " N"]  # sum of e_k^2: without a drift, dW^T (H + lambda) dW against where the loop began


Rows = Callable[[jax.Array, int], Float[jax.Array, "B K"]]
"""Given a start and a size, those rows of a matrix over K, all its columns: the matrix itself may lie elsewhere."""


class _State(NamedTuple):
    """What the loops carry."""

    w_kn: jax.Array  # weights, each row current when its turn comes
    codes_kn: jax.Array  # uint8
    grid: Grid  # [G, N], filled as groups begin
    loss_n: jax.Array


def compensate(
    w_kn: Float[jax.Array, "K N"],
    u_rows: Rows,
    weight_k: Float[jax.Array, " K"],
    *,
    rows: int,
    config: QuantizeConfig,
    fixed: tuple[Grid, Int[jax.Array, " K"]] | None = None,
    drift_rows: Rows | None = None,
) -> Compensated:
    """Quantizes rows in sequence (GPTQ, Frantar et al. 2022, algorithm 1), with lazy updates on two levels.

    Within a block of up to 128 rows errors spread after every 32, to the blocks after it once, as matmuls: what the inner steps
    touch stays in a cache.

    Args:
      w_kn: `[K, N]`, in the solver's sequence.
      u_rows: of the upper factor of the damped inverse, in the same sequence.
      weight_k: the diagonal of H, for the search of scales.
      rows: rows in a group.
      config: bits, grid and search.
      fixed: grids `[G, N]` that were set beforehand, and the group of each row; None where groups are runs of the sequence, and
        each is given its grid from its rows as they are when its turn comes.
      drift_rows: of GPTAQ's matrix, strictly upper; None for plain GPTQ.

    Returns:
      Codes, grids, and the loss.
    """
    k, n = w_kn.shape
    block = solver_block(k, rows)
    sources = (u_rows,) if drift_rows is None else (u_rows, drift_rows)

    def run_step(step: jax.Array, carry: tuple[_State, _Moved], factors: _Factors, start: jax.Array) -> tuple[_State, _Moved]:
        state, moved = carry
        row = start + step * _STEP
        if fixed is None:
            begun = functools.partial(_begin_group, state, weight_k, row, rows, config)
            grid = jax.lax.cond(row % rows == 0, begun, lambda: state.grid)
            of_step = jax.tree.map(lambda part_gn: jax.lax.dynamic_slice_in_dim(part_gn, row // rows, 1), grid)
        else:
            grid = state.grid
            groups_r = jax.lax.dynamic_slice_in_dim(fixed[1], row, _STEP)
            of_step = jax.tree.map(lambda part_gn: part_gn[groups_r], grid)
        w_rn = jax.lax.dynamic_slice_in_dim(state.w_kn, row, _STEP)
        corners = [jax.lax.dynamic_slice(factor_bk, (step * _STEP, row), (_STEP, _STEP)) for factor_bk in factors]
        found = gptq_block(w_rn, corners[0], *of_step, *corners[1:], bits=config.bits)
        new = (found.error_rn, found.turn_rn)[: len(factors)]
        # Rows up to this step are done, and those of U would move them on.
        later_b = (jnp.arange(block) >= (step + 1) * _STEP)[None, :]
        of_block = [jax.lax.dynamic_slice(factor_bk, (step * _STEP, start), (_STEP, block)) for factor_bk in factors]
        w_bn = jax.lax.dynamic_slice_in_dim(state.w_kn, start, block)
        w_bn = _spread(w_bn, [jnp.where(later_b, factor_rb, 0.0) for factor_rb in of_block], new)
        state = _State(
            jax.lax.dynamic_update_slice_in_dim(state.w_kn, w_bn, start, 0),
            jax.lax.dynamic_update_slice_in_dim(state.codes_kn, found.codes_rn, row, 0),
            grid,
            state.loss_n + jnp.sum(jnp.square(found.error_rn), axis=0),
        )
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=step * _STEP, axis=0)
        return state, tuple(put(all_bn, part_rn) for all_bn, part_rn in zip(moved, new, strict=True))

    def run_block(index: jax.Array, state: _State) -> _State:
        start = index * block
        factors = tuple(rows_of(start, block) for rows_of in sources)
        run = functools.partial(run_step, factors=factors, start=start)
        nothing = tuple(jnp.zeros((block, n), w_kn.dtype) for _ in factors)
        state, moved = jax.lax.fori_loop(0, block // _STEP, run, (state, nothing))

        def update(later: jax.Array, w_kn: jax.Array) -> jax.Array:
            of_block = [jax.lax.dynamic_slice(factor_bk, (0, later * block), (block, block)) for factor_bk in factors]
            w_bn = _spread(jax.lax.dynamic_slice_in_dim(w_kn, later * block, block), of_block, moved)
            return jax.lax.dynamic_update_slice_in_dim(w_kn, w_bn, later * block, 0)

        return state._replace(w_kn=jax.lax.fori_loop(index + 1, k // block, update, state.w_kn))

    empty = Grid(jnp.ones((k // rows, n), w_kn.dtype), jnp.zeros((k // rows, n), w_kn.dtype))
    state = _State(w_kn, jnp.zeros((k, n), jnp.uint8), empty if fixed is None else fixed[0], jnp.zeros_like(w_kn[0]))
    state = jax.lax.fori_loop(0, k // block, run_block, state)
    return Compensated(state.codes_kn, state.grid, state.loss_n)


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


def _spread(w_bn: jax.Array, factors: Sequence[jax.Array], moved: Sequence[jax.Array]) -> jax.Array:
    """`w - u^T e`, what the errors of R rows change in B later ones, and `+ p^T w_turn`, what GPTAQ's correction does."""
    products = [product(transposed(factor_rb), moved_rn) for factor_rb, moved_rn in zip(factors, moved, strict=True)]
    return w_bn - products[0] if len(products) == 1 else w_bn - products[0] + products[1]
