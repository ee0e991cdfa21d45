"""The blocked loop over rows: quantize, and spread the error over the rows that follow."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jgptq.notation import Float, Int, UInt8
from jgptq.settings.sizes import ROW_MULTIPLE
from jgptq.solver.codes.grid import Grid, GridSpec
from jgptq.solver.linalg.triangular import product, product_over, transposed
from jgptq.solver.placement import RowReader
from pallas_kernels import BlockResult, Given, Searched, gptq_block
from pallas_kernels.gptq_block.interface import MOST_ROWS
from pallas_kernels.gptq_block.reference import PLAIN

_MAX_RUN = 4  # blocks


class Compensated(NamedTuple):
    """Codes and the grids that they are of, in the solver's sequence of rows."""

    codes_kn: UInt8[jax.Array, "K N"]
    grid: Grid  # [G, N]
    loss_n: Float[jax.Array, " N"]  # sum of e_k^2: without a drift, dW^T (H + lambda) dW against where the loop began
    moved_n: Float[jax.Array, " N"]  # sum of dW^2 against the same


class _State(NamedTuple):
    """What the loop over blocks carries."""

    w_kn: jax.Array  # rows not yet quantized; of those that are, the error w - q
    current_kn: jax.Array  # of rows that are quantized, their values just before; [0, N] without a drift
    codes_kn: jax.Array  # uint8
    grid: Grid  # [G, N], filled group by group
    loss_n: jax.Array
    moved_n: jax.Array


class _RunInput(NamedTuple):
    """What the rows before a run of blocks do to all rows of the run, and those rows of the matrices that say so."""

    start: jax.Array
    l_sk: jax.Array
    pull_sn: jax.Array  # the product of L with the errors so far
    drift_sk: jax.Array | None  # GPTAQ's matrix, transposed
    drift_sn: jax.Array | None  # its product with the quantized rows' values just before


class _BlockInput(NamedTuple):
    """A block as the rows before it leave it."""

    target_bn: jax.Array  # what its codes are held against: the kernel, moved by a drift
    w_bn: jax.Array  # the same, with the errors of the rows before it spread over it
    u_bb: jax.Array  # the upper factor of the inverse Hessian given those rows
    drift_bb: jax.Array | None  # GPTAQ's matrix in this block, strictly upper


def compensate(
    w_kn: Float[jax.Array, "K N"],
    factor: RowReader,
    u_cbb: Float[jax.Array, "C B B"],
    weight_k: Float[jax.Array, " K"],
    *,
    group_size: int,
    spec: GridSpec,
    fixed: tuple[Grid, Int[jax.Array, " K"]] | None = None,
    drift: RowReader | None = None,
) -> Compensated:
    """Quantizes rows in sequence (GPTQ, Frantar et al. 2022, algorithm 1), blocks at a time, without the inverse Hessian.

    With `H = L^T L`, the loss of a column is `||L (w - q)||^2`, and the rows before block B pull it from w_B to
    `w_B + L_BB^-1 L_B: (w - q)`, the least squares solution given their codes: one product of a row of blocks of L with the
    errors so far. From there on the block is a problem of its own, with `U_BB = L_BB^-T` the same as the block of the published
    loop's factor `H^-1 = U^T U`. So one triangular factorization serves; the published loop takes three times the work to U.
    What lies before a run of several blocks is multiplied for all its rows at once, for the sake of larger products.

    Inside a block of up to 128 rows the published loop runs, `pallas_kernels.gptq_block.interface`.

    Args:
      w_kn: `[K, N]`, in the solver's sequence.
      factor: L, the lower factor of the damped Hessian, in the same sequence.
      u_cbb: `L_BB^-T` of each block of `solver_block(K, group_size)` rows.
      weight_k: the diagonal of H, for the search of scales.
      group_size: rows in a group; divides K.
      spec: which grids, and how they are searched.
      fixed: grids `[G, N]` that were set beforehand, and the group of each row; None where groups are runs of the sequence, and
        each is given its grid from its rows as those before them leave them.
      drift: GPTAQ's matrix transposed, strictly lower; None for plain GPTQ.

    Returns:
      Codes, grids, and the loss.
    """
    k, n = w_kn.shape
    block = solver_block(k, group_size)
    empty = Grid(jnp.ones((k // group_size, n), w_kn.dtype), jnp.zeros((k // group_size, n), w_kn.dtype))
    if fixed is None and group_size == k:
        fixed = _with_group(empty, w_kn, weight_k, jnp.int32(0), spec), jnp.zeros(k, jnp.int32)
    loop = _Loop(
        factor=factor,
        drift=drift,
        u_cbb=u_cbb,
        weight_k=weight_k,
        fixed=fixed,
        group_size=group_size,
        block=block,
        run=block if group_size > block else _run_of_blocks(k, block),
        spec=spec,
    )
    current_kn, zeros_n = jnp.zeros((0 if drift is None else k, n), w_kn.dtype), jnp.zeros_like(w_kn[0])
    grid = empty if fixed is None else fixed[0]
    state = _State(w_kn, current_kn, jnp.zeros((k, n), jnp.uint8), grid, zeros_n, zeros_n)
    state = jax.lax.fori_loop(0, k // loop.run, loop.quantize_run, state)
    return Compensated(state.codes_kn, state.grid, state.loss_n, state.moved_n)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Loop:
    """What stays the same from block to block, and the steps that are made of it."""

    factor: RowReader
    drift: RowReader | None
    u_cbb: jax.Array
    weight_k: jax.Array
    fixed: tuple[Grid, jax.Array] | None
    group_size: int
    block: int  # rows
    run: int  # rows of the blocks for which the products with what lies before them are made at once
    spec: GridSpec

    def run_input(self, start: jax.Array, size: int, state: _State) -> _RunInput:
        """What the rows before `start` do to those from there on."""
        l_sk = self.factor.rows(start, size)
        drift_sk = None if self.drift is None else self.drift.rows(start, size)
        drift_sn = None if drift_sk is None else product_over(drift_sk, state.current_kn, jnp.int32(0), start, size)
        return _RunInput(start, l_sk, product_over(l_sk, state.w_kn, jnp.int32(0), start, size), drift_sk, drift_sn)

    def block_input(self, start: jax.Array, state: _State, before: _RunInput) -> _BlockInput:
        """The block at `start`, as the rows before it leave it."""

        def with_run(a_sk: jax.Array, a_sn: jax.Array, b_kn: jax.Array) -> tuple[jax.Array, jax.Array]:
            a_bk, sum_bn = (jax.lax.dynamic_slice_in_dim(part, start - before.start, self.block) for part in (a_sk, a_sn))
            return a_bk, sum_bn + product_over(a_bk, b_kn, before.start, start, self.block)

        target_bn = jax.lax.dynamic_slice_in_dim(state.w_kn, start, self.block)
        drift_bb = None
        if before.drift_sk is not None and before.drift_sn is not None:
            drift_bk, drift_bn = with_run(before.drift_sk, before.drift_sn, state.current_kn)
            drift_bb = jax.lax.dynamic_slice_in_dim(drift_bk, start, self.block, axis=1).T
            target_bn = target_bn + drift_bn
        u_bb = jax.lax.dynamic_index_in_dim(self.u_cbb, start // self.block, keepdims=False)
        pulled_bn = product(transposed(u_bb), with_run(before.l_sk, before.pull_sn, state.w_kn)[1])
        return _BlockInput(target_bn, target_bn + pulled_bn, u_bb, drift_bb)

    def with_wide_group(self, start: jax.Array, state: _State) -> Grid:
        """All grids, with that of the group of several blocks that begins at `start`, from its rows before any has a code."""

        def add_block(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            group_rn, w_kn = carry
            at, so_far = start + index * self.block, state._replace(w_kn=w_kn)
            of_block = self.block_input(at, so_far, self.run_input(at, self.block, so_far))
            moved_bn = of_block.target_bn - of_block.w_bn  # the error that a block has which no grid rounds
            w_kn = jax.lax.dynamic_update_slice_in_dim(w_kn, moved_bn, at, 0)
            return jax.lax.dynamic_update_slice_in_dim(group_rn, of_block.w_bn, index * self.block, 0), w_kn

        group_rn = jnp.zeros_like(state.w_kn[: self.group_size])
        group_rn, _ = jax.lax.fori_loop(0, self.group_size // self.block, add_block, (group_rn, state.w_kn))
        return _with_group(state.grid, group_rn, self.weight_k, start, self.spec)

    def grids_of_block(self, start: jax.Array, state: _State) -> tuple[Grid, Given | Searched]:
        """All grids, with that of a wide group that begins here; and those of the block, or how to search them."""
        grid = state.grid
        if self.fixed is not None:
            groups_b = jax.lax.dynamic_slice_in_dim(self.fixed[1], start, self.block)
            return grid, Given(*(part_gn[groups_b] for part_gn in grid))
        if self.group_size <= self.block:
            weight_b = jax.lax.dynamic_slice_in_dim(self.weight_k, start, self.block)
            return grid, Searched(weight_b, self.group_size, self.spec.search)
        grid = jax.lax.cond(start % self.group_size == 0, lambda: self.with_wide_group(start, state), lambda: grid)
        return grid, Given(*(jax.lax.dynamic_slice_in_dim(part_gn, start // self.group_size, 1) for part_gn in grid))

    def quantize_block(self, index: jax.Array, state: _State, before: _RunInput) -> _State:
        """Quantizes a block, and keeps its rows' errors for those that follow."""
        start = before.start + index * self.block
        given = self.block_input(start, state, before)
        grid, of_block = self.grids_of_block(start, state)
        result = gptq_block(given.w_bn, given.u_bb, of_block, given.drift_bb, bits=self.spec.bits)
        if isinstance(of_block, Searched):
            put_grid = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start // self.group_size, axis=0)
            grid = Grid(put_grid(grid.scale_n, result.scale_gn), put_grid(grid.zero_n, result.zero_gn))
        target_bn, current_kn = given.target_bn, state.current_kn
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
        if given.drift_bb is not None:
            target_bn = target_bn + product(transposed(given.drift_bb), result.updated_rn)
            current_kn = put(current_kn, result.updated_rn)
        error_bn = target_bn - _points(result)
        return _State(
            put(state.w_kn, error_bn),
            current_kn,
            put(state.codes_kn, result.codes_rn),
            grid,
            state.loss_n + jnp.sum(jnp.square(result.error_rn), axis=0),
            state.moved_n + jnp.sum(jnp.square(error_bn), axis=0),
        )

    def quantize_run(self, index: jax.Array, state: _State) -> _State:
        """Quantizes a run of blocks, one after the other."""
        before = self.run_input(index * self.run, self.run, state)
        quantize_block = functools.partial(self.quantize_block, before=before)
        return jax.lax.fori_loop(0, self.run // self.block, quantize_block, state)


def solver_block(k: int, group_size: int) -> int:
    """Rows in one lazy block: the largest multiple of 32 up to 128 that divides K and holds whole groups, or lies within one."""
    sizes = range(ROW_MULTIPLE, MOST_ROWS + 1, ROW_MULTIPLE)
    return max(b for b in sizes if k % b == 0 and (b % group_size == 0 or group_size % b == 0))


def _run_of_blocks(k: int, block: int) -> int:
    """Rows of a run: the most blocks up to four that divide K."""
    return block * max(count for count in range(1, _MAX_RUN + 1) if k % (count * block) == 0)


def _points(result: BlockResult) -> jax.Array:
    """The grid points that codes stand for."""
    scale_rn, zero_rn = (
        jnp.repeat(part_gn, result.codes_rn.shape[0] // part_gn.shape[0], axis=0) for part_gn in (result.scale_gn, result.zero_gn)
    )
    return scale_rn * (result.codes_rn.astype(result.error_rn.dtype) - zero_rn)


def _with_group(all_groups: Grid, w_rn: jax.Array, weight_k: jax.Array, row: jax.Array, spec: GridSpec) -> Grid:
    """All grids, with that of the group that begins at `row`, searched from its rows."""
    group_size = w_rn.shape[0]
    of_group = spec.search(w_rn, jax.lax.dynamic_slice_in_dim(weight_k, row, group_size), PLAIN)
    put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=row // group_size, axis=0)
    return Grid(*map(put, all_groups, of_group))
