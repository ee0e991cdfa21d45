"""The blocked loop over rows: quantize, and spread the error over the rows that follow."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jgptq.notation import Float, Int, UInt8
from jgptq.settings.sizes import ROW_MULTIPLE
from jgptq.settings.solver import SolverConfig
from jgptq.solver.grid import Grid, search_grid
from jgptq.solver.linalg.triangular import product, transposed
from pallas_kernels import BlockResult, Given, Search, Searched, gptq_block
from pallas_kernels.gptq_block.interface import MOST_ROWS
from pallas_kernels.gptq_block.reference import PLAIN

_MAX_RUN = 4  # blocks


class Compensated(NamedTuple):
    """Codes and the grids that they are of, in the solver's sequence of rows."""

    codes_kn: UInt8[jax.Array, "K N"]
    grid: Grid  # [G, N]
    loss_n: Float[jax.Array, " N"]  # sum of e_k^2: without a drift, dW^T (H + lambda) dW against where the loop began
    moved_n: Float[jax.Array, " N"]  # sum of dW^2, likewise


Rows = Callable[[jax.Array, int], Float[jax.Array, "B K"]]
"""Given a start and a size, those rows of a matrix over K, all its columns: the matrix itself may lie elsewhere."""


class _State(NamedTuple):
    """What the loop over blocks carries."""

    w_kn: jax.Array  # rows that are yet to come; and of those that are done, what they lost, w - q
    turn_kn: jax.Array  # each row as it was when its turn came; [0, N] without a drift
    codes_kn: jax.Array  # uint8
    grid: Grid  # [G, N], filled as groups begin
    loss_n: jax.Array
    moved_n: jax.Array


class _Past(NamedTuple):
    """What the rows before a run of blocks do to all rows of the run, and those rows of the matrices that say so."""

    start: jax.Array
    l_sk: jax.Array
    pull_sn: jax.Array  # the product of L with what was lost so far
    drift_sk: jax.Array | None  # GPTAQ's matrix, transposed
    drift_sn: jax.Array | None  # and its product with the rows as they were when their turn came


class _Turn(NamedTuple):
    """What a block begins with."""

    target_bn: jax.Array  # what its codes are held against: the kernel, moved by a drift
    w_bn: jax.Array  # the same, pulled by what the rows before it lost
    u_bb: jax.Array  # the upper factor of the inverse Hessian given those rows
    drift_bb: jax.Array | None  # GPTAQ's matrix in this block, strictly upper


def compensate(
    w_kn: Float[jax.Array, "K N"],
    l_rows: Rows,
    u_cbb: Float[jax.Array, "C B B"],
    weight_k: Float[jax.Array, " K"],
    *,
    rows: int,
    config: SolverConfig,
    fixed: tuple[Grid, Int[jax.Array, " K"]] | None = None,
    drift_rows: Rows | None = None,
) -> Compensated:
    """Quantizes rows in sequence (GPTQ, Frantar et al. 2022, algorithm 1), blocks at a time, without the inverse Hessian.

    With `H = L^T L`, the loss of a column is `||L (w - q)||^2`, and the rows before block B pull it from w_B to
    `w_B + L_BB^-1 L_B: (w - q)`, the least squares solution given their codes: one product of a row of blocks of L with what was
    lost so far. From there on the block is a problem of its own, with `U_BB = L_BB^-T` the same as the block of the published
    loop's factor `H^-1 = U^T U`. So one triangular factorization serves; the published loop takes three times the work to U.
    What lies before a run of several blocks is multiplied for all its rows at once, for the sake of larger products.

    Inside a block of up to 128 rows the published loop runs, `pallas_kernels.gptq_block.interface`.

    Args:
      w_kn: `[K, N]`, in the solver's sequence.
      l_rows: of the lower factor of the damped Hessian, in the same sequence.
      u_cbb: `L_BB^-T` of each block of `solver_block(K, rows)` rows.
      weight_k: the diagonal of H, for the search of scales.
      rows: rows in a group.
      config: bits, grid and search.
      fixed: grids `[G, N]` that were set beforehand, and the group of each row; None where groups are runs of the sequence, and
        each is given its grid from its rows as they are when its turn comes.
      drift_rows: of GPTAQ's matrix transposed, strictly lower; None for plain GPTQ.

    Returns:
      Codes, grids, and the loss.
    """
    k, n = w_kn.shape
    block = solver_block(k, rows)
    empty = Grid(jnp.ones((k // rows, n), w_kn.dtype), jnp.zeros((k // rows, n), w_kn.dtype))
    if fixed is None and rows == k:
        fixed = _begin_group(empty, w_kn, weight_k, jnp.int32(0), config), jnp.zeros(k, jnp.int32)
    loop = _Loop(
        l_rows=l_rows,
        drift_rows=drift_rows,
        u_cbb=u_cbb,
        weight_k=weight_k,
        fixed=fixed,
        rows=rows,
        block=block,
        run=block if rows > block else _run_of_blocks(k, block),
        config=config,
    )
    nothing_n = jnp.zeros_like(w_kn[0])
    state = _State(
        w_kn,
        jnp.zeros((0 if drift_rows is None else k, n), w_kn.dtype),
        jnp.zeros((k, n), jnp.uint8),
        empty if fixed is None else fixed[0],
        nothing_n,
        nothing_n,
    )
    state = jax.lax.fori_loop(0, k // loop.run, loop.run_blocks, state)
    return Compensated(state.codes_kn, state.grid, state.loss_n, state.moved_n)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Loop:
    """What stays the same from block to block, and the steps that are made of it."""

    l_rows: Rows
    drift_rows: Rows | None
    u_cbb: jax.Array
    weight_k: jax.Array
    fixed: tuple[Grid, jax.Array] | None
    rows: int  # in a group
    block: int
    run: int  # rows of blocks that what lies before them pulls at once
    config: SolverConfig

    def past(self, start: jax.Array, count: int, state: _State) -> _Past:
        """What the rows before `start` do to the next `count`."""
        l_sk = self.l_rows(start, count)
        drift_sk = None if self.drift_rows is None else self.drift_rows(start, count)
        drift_sn = None if drift_sk is None else _product_over(drift_sk, state.turn_kn, jnp.int32(0), start, count)
        return _Past(start, l_sk, _product_over(l_sk, state.w_kn, jnp.int32(0), start, count), drift_sk, drift_sn)

    def turn(self, start: jax.Array, state: _State, before: _Past) -> _Turn:
        """What a block begins with."""

        def so_far(a_sk: jax.Array, a_sn: jax.Array, b_kn: jax.Array) -> tuple[jax.Array, jax.Array]:
            a_bk, sum_bn = (jax.lax.dynamic_slice_in_dim(part, start - before.start, self.block) for part in (a_sk, a_sn))
            return a_bk, sum_bn + _product_over(a_bk, b_kn, before.start, start, self.block)

        target_bn = jax.lax.dynamic_slice_in_dim(state.w_kn, start, self.block)
        drift_bb = None
        if before.drift_sk is not None and before.drift_sn is not None:
            drift_bk, drift_bn = so_far(before.drift_sk, before.drift_sn, state.turn_kn)
            drift_bb = jax.lax.dynamic_slice_in_dim(drift_bk, start, self.block, axis=1).T
            target_bn = target_bn + drift_bn
        u_bb = jax.lax.dynamic_index_in_dim(self.u_cbb, start // self.block, keepdims=False)
        pulled_bn = product(transposed(u_bb), so_far(before.l_sk, before.pull_sn, state.w_kn)[1])
        return _Turn(target_bn, target_bn + pulled_bn, u_bb, drift_bb)

    def begin_wide_group(self, start: jax.Array, state: _State) -> Grid:
        """Sets the grid of a group of several blocks, from its rows as they are before the first of them has codes."""

        def current(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            group_rn, w_kn = carry
            at, so_far = start + index * self.block, state._replace(w_kn=w_kn)
            of_block = self.turn(at, so_far, self.past(at, self.block, so_far))
            moved_bn = of_block.target_bn - of_block.w_bn  # as if it had no grid
            w_kn = jax.lax.dynamic_update_slice_in_dim(w_kn, moved_bn, at, 0)
            return jax.lax.dynamic_update_slice_in_dim(group_rn, of_block.w_bn, index * self.block, 0), w_kn

        group_rn = jnp.zeros_like(state.w_kn[: self.rows])
        group_rn, _ = jax.lax.fori_loop(0, self.rows // self.block, current, (group_rn, state.w_kn))
        return _begin_group(state.grid, group_rn, self.weight_k, start, self.config)

    def grids_of_block(self, start: jax.Array, state: _State) -> tuple[Grid, Given | Searched]:
        """All grids, with that of a wide group that begins here; and those of the block, or how to find them."""
        grid = state.grid
        if self.fixed is not None:
            groups_b = jax.lax.dynamic_slice_in_dim(self.fixed[1], start, self.block)
            return grid, Given(*(part_gn[groups_b] for part_gn in grid))
        if self.rows <= self.block:
            weight_b = jax.lax.dynamic_slice_in_dim(self.weight_k, start, self.block)
            return grid, Searched(weight_b, self.rows, _search_of(self.config))
        grid = jax.lax.cond(start % self.rows == 0, lambda: self.begin_wide_group(start, state), lambda: grid)
        return grid, Given(*(jax.lax.dynamic_slice_in_dim(part_gn, start // self.rows, 1) for part_gn in grid))

    def run_block(self, index: jax.Array, state: _State, before: _Past) -> _State:
        """Quantizes a block, and keeps what its rows lost for those to come."""
        start = before.start + index * self.block
        begun = self.turn(start, state, before)
        grid, of_block = self.grids_of_block(start, state)
        found = gptq_block(begun.w_bn, begun.u_bb, of_block, begun.drift_bb, bits=self.config.bits)
        if isinstance(of_block, Searched):
            put_grid = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start // self.rows, axis=0)
            grid = Grid(put_grid(grid.scale_n, found.scale_gn), put_grid(grid.zero_n, found.zero_gn))
        target_bn, turn_kn = begun.target_bn, state.turn_kn
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
        if begun.drift_bb is not None:
            target_bn = target_bn + product(transposed(begun.drift_bb), found.updated_rn)
            turn_kn = put(turn_kn, found.updated_rn)
        moved_bn = target_bn - _points(found)
        return _State(
            put(state.w_kn, moved_bn),
            turn_kn,
            put(state.codes_kn, found.codes_rn),
            grid,
            state.loss_n + jnp.sum(jnp.square(found.error_rn), axis=0),
            state.moved_n + jnp.sum(jnp.square(moved_bn), axis=0),
        )

    def run_blocks(self, index: jax.Array, state: _State) -> _State:
        """Quantizes a run of blocks, one after the other."""
        before = self.past(index * self.run, self.run, state)
        return jax.lax.fori_loop(0, self.run // self.block, functools.partial(self.run_block, before=before), state)


def solver_block(k: int, rows: int) -> int:
    """Rows in one lazy block: the largest multiple of 32 up to 128 that divides K and holds whole groups, or lies within one."""
    fits = [b for b in range(ROW_MULTIPLE, MOST_ROWS + 1, ROW_MULTIPLE) if k % b == 0 and (b % rows == 0 or rows % b == 0)]
    return max(fits)


def _run_of_blocks(k: int, block: int) -> int:
    """Rows that are pulled at once: the most blocks up to four that divide K."""
    return block * max(count for count in range(1, _MAX_RUN + 1) if k % (count * block) == 0)


def _product_over(a_bk: jax.Array, b_kn: jax.Array, start: jax.Array, stop: jax.Array, size: int) -> jax.Array:
    """`A B` over K from `start` to `stop`, multiples of `size`."""

    def add(index: jax.Array, sum_bn: jax.Array) -> jax.Array:
        a_bs = jax.lax.dynamic_slice_in_dim(a_bk, index * size, size, axis=1)
        return sum_bn + product(a_bs, jax.lax.dynamic_slice_in_dim(b_kn, index * size, size))

    nothing_bn = jnp.zeros((a_bk.shape[0], b_kn.shape[1]), b_kn.dtype)
    return jax.lax.fori_loop(start // size, stop // size, add, nothing_bn)


def _points(found: BlockResult) -> jax.Array:
    """The grid points that codes stand for."""
    scale_rn, zero_rn = (
        jnp.repeat(part_gn, found.codes_rn.shape[0] // part_gn.shape[0], axis=0) for part_gn in (found.scale_gn, found.zero_gn)
    )
    return scale_rn * (found.codes_rn.astype(found.error_rn.dtype) - zero_rn)


def _search_of(config: SolverConfig) -> Search:
    """How the grid of a group is found."""
    return functools.partial(search_grid, bits=config.bits, sym=config.sym, scale=config.grid_search)


def _begin_group(all_groups: Grid, w_rn: jax.Array, weight_k: jax.Array, row: jax.Array, config: SolverConfig) -> Grid:
    """Sets the grid of the group that begins at `row` from its rows as they are now."""
    rows = w_rn.shape[0]
    begun = _search_of(config)(w_rn, jax.lax.dynamic_slice_in_dim(weight_k, row, rows), PLAIN)
    put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=row // rows, axis=0)
    return Grid(*map(put, all_groups, begun))
