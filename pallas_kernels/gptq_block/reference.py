"""The solver's inner loop in plain JAX: the kernel's oracle, and what a machine without a GPU runs."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

STEP = 32
"""Rows after which errors spread inside of a block: what the steps in between touch stays in a cache."""


class Arithmetic(NamedTuple):
    """Operations that a kernel has to spell out, for what is traced inside of it."""

    divide: Callable[[jax.Array, jax.Array], jax.Array]  # rounded once
    round: Callable[[jax.Array], jax.Array]  # half to even
    divisor: Callable[[jax.Array], jax.Array]  # of a constant to divide by: XLA would multiply by its reciprocal


PLAIN = Arithmetic(jnp.divide, jnp.round, jax.lax.optimization_barrier)

Search = Callable[[jax.Array, jax.Array, Arithmetic], tuple[jax.Array, jax.Array]]
"""Given the rows of a group `[R, N]`, their weights `[R]` and what to divide and round with: its scale and zero point `[N]`. Rows
of zeros must not matter: a kernel puts them where other groups are."""


class Given(NamedTuple):
    """Grids that were set beforehand."""

    scale_rn: jax.Array  # [R, N], or [1, N] where all rows share a grid
    zero_rn: jax.Array  # of the same shape, integers


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weight_r"], meta_fields=["rows", "search"])
@dataclasses.dataclass(frozen=True)
class Searched:
    """Grids that are set on the way: that of a group from its rows as they are when the first of them has its turn."""

    weight_r: jax.Array  # [R], what the search is given beside the rows
    rows: int  # in a group; a multiple of 32 that divides R
    search: Search


class BlockResult(NamedTuple):
    """What `gptq_block` finds for R rows and N columns."""

    codes_rn: jax.Array  # uint8 [R, N], unsigned codes
    error_rn: jax.Array  # [R, N], (w - dequantized) / u_kk, to be spread over the rows that follow
    turn_rn: jax.Array  # [R, N], each row as it was when its turn came; [0, N] without a drift
    scale_gn: jax.Array  # [G, N], of runs of R / G rows: as given, or as found
    zero_gn: jax.Array  # of the same shape


def gptq_block(
    w_rn: jax.Array, u_rr: jax.Array, grids: Given | Searched, drift_rr: jax.Array | None = None, *, bits: int
) -> BlockResult:
    """The steps of `pallas_kernels.gptq_block.interface`, whose arguments and result these are; of any float dtype and any R.

    Errors spread after every 32 rows, as one product with all of them so far, those of rows yet to come being zero.
    """
    rows, n = w_rn.shape
    step = STEP if rows % STEP == 0 else rows

    def run_step(index: jax.Array, done: BlockResult) -> BlockResult:
        at = index * step
        scale_gn, zero_gn = done.scale_gn, done.zero_gn
        if isinstance(grids, Searched):
            scale_gn, zero_gn = _begun(at, done, w_rn, u_rr, grids, drift_rr)
        u_ss = jax.lax.dynamic_slice(u_rr, (at, at), (step, step))
        drift_ss = None if drift_rr is None else jax.lax.dynamic_slice(drift_rr, (at, at), (step, step))
        scale_sn, zero_sn = (_of_rows(part_gn, at, step, rows) for part_gn in (scale_gn, zero_gn))
        w_sn = _pulled(at, step, done, w_rn, u_rr, drift_rr)
        codes_sn, error_sn, turn_sn = _steps(w_sn, u_ss, scale_sn, zero_sn, drift_ss, bits=bits)
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=at, axis=0)
        turn_rn = done.turn_rn if drift_rr is None else put(done.turn_rn, turn_sn)
        return BlockResult(put(done.codes_rn, codes_sn), put(done.error_rn, error_sn), turn_rn, scale_gn, zero_gn)

    nothing_rn = jnp.zeros_like(w_rn)
    # Without a drift nobody reads the rows of the turn, and none are kept.
    turn_rn = nothing_rn[:0] if drift_rr is None else nothing_rn
    scale_gn, zero_gn = grids if isinstance(grids, Given) else [jnp.ones((rows // grids.rows, n), w_rn.dtype)] * 2
    start = BlockResult(nothing_rn.astype(jnp.uint8), nothing_rn, turn_rn, scale_gn, zero_gn)
    return jax.lax.fori_loop(0, rows // step, run_step, start)


def _pulled(
    at: jax.Array, count: int, done: BlockResult, w_rn: jax.Array, u_rr: jax.Array, drift_rr: jax.Array | None
) -> jax.Array:
    """Rows as those before them leave them."""
    if count == w_rn.shape[0]:
        return w_rn
    # Rows that are yet to come hold a zero error, so that whole columns of U may be used.
    pulled_sn = jax.lax.dynamic_slice_in_dim(w_rn, at, count) - _columns_times(u_rr, at, count, done.error_rn)
    if drift_rr is not None:
        pulled_sn = pulled_sn + _columns_times(drift_rr, at, count, done.turn_rn)
    return pulled_sn


def _columns_times(a_rr: jax.Array, at: jax.Array, count: int, b_rn: jax.Array) -> jax.Array:
    """`A[:, at:at+count]^T B`, the factor laid out as such: a CPU multiplies by one that XLA folded in at half the speed."""
    a_sr = jax.lax.optimization_barrier(jax.lax.dynamic_slice_in_dim(a_rr, at, count, axis=1).T)
    return _product(a_sr, b_rn)


def _begun(
    at: jax.Array, done: BlockResult, w_rn: jax.Array, u_rr: jax.Array, grids: Searched, drift_rr: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """All grids, with that of a group that begins here."""
    weight_s = jax.lax.dynamic_slice_in_dim(grids.weight_r, at, grids.rows)

    def begin() -> tuple[jax.Array, jax.Array]:
        grid = grids.search(_pulled(at, grids.rows, done, w_rn, u_rr, drift_rr), weight_s, PLAIN)
        old, index = (done.scale_gn, done.zero_gn), at // grids.rows
        scale_gn, zero_gn = (
            jax.lax.dynamic_update_index_in_dim(all_gn, of_n, index, 0) for all_gn, of_n in zip(old, grid, strict=True)
        )
        return scale_gn, zero_gn

    return jax.lax.cond(at % grids.rows == 0, begin, lambda: (done.scale_gn, done.zero_gn))


def _of_rows(part_gn: jax.Array, at: jax.Array, count: int, rows: int) -> jax.Array:
    """Of scales or zero points `[G, N]`, those of some rows: `[1, N]` where they share one."""
    in_group = rows // part_gn.shape[0]
    return jax.lax.dynamic_slice_in_dim(part_gn, at // in_group, max(1, count // in_group))


def _steps(
    w_rn: jax.Array, u_rr: jax.Array, scale_rn: jax.Array, zero_rn: jax.Array, drift_rr: jax.Array | None = None, *, bits: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes, errors and rows of the turn, one row after the other: each is updated by one product with all errors so far."""
    shared = scale_rn.shape[0] == 1

    def step(k: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        codes_rn, error_rn, turn_rn = carry
        w_n = w_rn[k] - _product(u_rr[:, k], error_rn)
        if drift_rr is not None:
            w_n = w_n + _product(drift_rr[:, k], turn_rn)
        scale_n, zero_n = (part[0] if shared else part[k] for part in (scale_rn, zero_rn))
        code_n = jnp.clip(jnp.round(w_n / scale_n) + zero_n, 0, 2**bits - 1)
        error_n = (w_n - scale_n * (code_n - zero_n)) / u_rr[k, k]
        codes_rn = jax.lax.dynamic_update_index_in_dim(codes_rn, code_n.astype(jnp.uint8), k, 0)
        turn_rn = turn_rn if drift_rr is None else jax.lax.dynamic_update_index_in_dim(turn_rn, w_n, k, 0)
        return codes_rn, jax.lax.dynamic_update_index_in_dim(error_rn, error_n, k, 0), turn_rn

    nothing_rn = jnp.zeros_like(w_rn)
    turn_rn = nothing_rn[:0] if drift_rr is None else nothing_rn
    return jax.lax.fori_loop(0, w_rn.shape[0], step, (nothing_rn.astype(jnp.uint8), nothing_rn, turn_rn))


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
