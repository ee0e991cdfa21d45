"""The solver's inner loop in plain JAX: the kernel's oracle, and what a machine without a GPU runs."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.gptq_block.operands import Arithmetic, BlockResult, Given, Searched

STEP = 32
"""Rows after which errors spread inside a block: what the steps in between touch stays in a cache."""

PLAIN = Arithmetic(jnp.divide, jnp.round, jax.lax.optimization_barrier)
"""Exact arithmetic in plain JAX."""


def gptq_block(
    w_rn: jax.Array, u_rr: jax.Array, grids: Given | Searched, drift_rr: jax.Array | None = None, *, bits: int
) -> BlockResult:
    """`pallas_kernels.gptq_block` with the same arguments and result, for any float dtype and any R.

    Errors spread after every 32 rows, as one product with the errors of all rows; those of later rows are still zero.
    """
    rows, n = w_rn.shape
    step = STEP if rows % STEP == 0 else rows

    def run_step(index: jax.Array, so_far: BlockResult) -> BlockResult:
        at = index * step
        scale_gn, zero_gn = so_far.scale_gn, so_far.zero_gn
        if isinstance(grids, Searched):
            scale_gn, zero_gn = _with_grid_at(at, so_far, w_rn, u_rr, grids, drift_rr)
        u_ss = jax.lax.dynamic_slice(u_rr, (at, at), (step, step))
        drift_ss = None if drift_rr is None else jax.lax.dynamic_slice(drift_rr, (at, at), (step, step))
        scale_sn, zero_sn = (_of_rows(part_gn, at, step, rows) for part_gn in (scale_gn, zero_gn))
        w_sn = _compensated(at, step, so_far, w_rn, u_rr, drift_rr)
        codes_sn, error_sn, updated_sn = _steps(w_sn, u_ss, scale_sn, zero_sn, drift_ss, bits=bits)
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=at, axis=0)
        updated_rn = so_far.updated_rn if drift_rr is None else put(so_far.updated_rn, updated_sn)
        return BlockResult(put(so_far.codes_rn, codes_sn), put(so_far.error_rn, error_sn), updated_rn, scale_gn, zero_gn)

    nothing_rn = jnp.zeros_like(w_rn)
    # Without a drift nothing reads the updated rows, and none are kept.
    updated_rn = nothing_rn[:0] if drift_rr is None else nothing_rn
    scale_gn, zero_gn = grids if isinstance(grids, Given) else [jnp.ones((rows // grids.group_size, n), w_rn.dtype)] * 2
    start = BlockResult(nothing_rn.astype(jnp.uint8), nothing_rn, updated_rn, scale_gn, zero_gn)
    return jax.lax.fori_loop(0, rows // step, run_step, start)


def _compensated(
    at: jax.Array, count: int, so_far: BlockResult, w_rn: jax.Array, u_rr: jax.Array, drift_rr: jax.Array | None
) -> jax.Array:
    """Rows as updated by all rows before them."""
    if count == w_rn.shape[0]:
        return w_rn
    # Later rows hold a zero error, so that whole columns of U may be used.
    updated_sn = jax.lax.dynamic_slice_in_dim(w_rn, at, count) - _columns_times(u_rr, at, count, so_far.error_rn)
    if drift_rr is not None:
        updated_sn = updated_sn + _columns_times(drift_rr, at, count, so_far.updated_rn)
    return updated_sn


def _columns_times(a_rr: jax.Array, at: jax.Array, count: int, b_rn: jax.Array) -> jax.Array:
    """`A[:, at:at+count]^T B`, the factor laid out as such: a CPU multiplies by one that XLA folded in at half the speed."""
    a_sr = jax.lax.optimization_barrier(jax.lax.dynamic_slice_in_dim(a_rr, at, count, axis=1).T)
    return _product(a_sr, b_rn)


def _with_grid_at(
    at: jax.Array, so_far: BlockResult, w_rn: jax.Array, u_rr: jax.Array, grids: Searched, drift_rr: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """All grids, with that of the group that begins at this row, if one does."""
    weight_s = jax.lax.dynamic_slice_in_dim(grids.weight_r, at, grids.group_size)

    def begin() -> tuple[jax.Array, jax.Array]:
        grid = grids.search(_compensated(at, grids.group_size, so_far, w_rn, u_rr, drift_rr), weight_s, PLAIN)
        old, index = (so_far.scale_gn, so_far.zero_gn), at // grids.group_size
        scale_gn, zero_gn = (
            jax.lax.dynamic_update_index_in_dim(all_gn, of_n, index, 0) for all_gn, of_n in zip(old, grid, strict=True)
        )
        return scale_gn, zero_gn

    return jax.lax.cond(at % grids.group_size == 0, begin, lambda: (so_far.scale_gn, so_far.zero_gn))


def _of_rows(part_gn: jax.Array, at: jax.Array, count: int, rows: int) -> jax.Array:
    """The scales or zero points of some rows, from those of all groups `[G, N]`: `[1, N]` where the rows share one."""
    in_group = rows // part_gn.shape[0]
    return jax.lax.dynamic_slice_in_dim(part_gn, at // in_group, max(1, count // in_group))


def _steps(
    w_rn: jax.Array, u_rr: jax.Array, scale_rn: jax.Array, zero_rn: jax.Array, drift_rr: jax.Array | None = None, *, bits: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes, errors and updated rows, one row after the other: each is updated by one product with all errors so far."""
    shared = scale_rn.shape[0] == 1

    def step(k: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        codes_rn, error_rn, updated_rn = carry
        w_n = w_rn[k] - _product(u_rr[:, k], error_rn)
        if drift_rr is not None:
            w_n = w_n + _product(drift_rr[:, k], updated_rn)
        scale_n, zero_n = (part[0] if shared else part[k] for part in (scale_rn, zero_rn))
        code_n = jnp.clip(jnp.round(w_n / scale_n) + zero_n, 0, 2**bits - 1)
        error_n = (w_n - scale_n * (code_n - zero_n)) / u_rr[k, k]
        codes_rn = jax.lax.dynamic_update_index_in_dim(codes_rn, code_n.astype(jnp.uint8), k, 0)
        updated_rn = updated_rn if drift_rr is None else jax.lax.dynamic_update_index_in_dim(updated_rn, w_n, k, 0)
        return codes_rn, jax.lax.dynamic_update_index_in_dim(error_rn, error_n, k, 0), updated_rn

    nothing_rn = jnp.zeros_like(w_rn)
    updated_rn = nothing_rn[:0] if drift_rr is None else nothing_rn
    return jax.lax.fori_loop(0, w_rn.shape[0], step, (nothing_rn.astype(jnp.uint8), nothing_rn, updated_rn))


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
