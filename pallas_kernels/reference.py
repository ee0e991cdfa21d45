"""The kernels' operations in plain JAX: their oracle, and what a machine without a GPU runs."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.layout import unpack_codes


def dequantize(
    qweight: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None = None,
    *,
    bits: int,
    group_size: int,
    order: jax.Array | None = None,
) -> jax.Array:
    """Expands a packed kernel: `w[k, n] = scales[g(k), n] * (code[k, n] - zero[g(k), n])`, with g(k) = order[k] or k //
    group_size.

    Args:
      qweight: int32 `[K*bits/32, N]`, codes packed along K.
      scales: float `[G, N]`.
      zeros: int32 `[G, N*bits/32]`, zero points packed along N; None means 2^(bits-1) everywhere.
      bits: width of a code.
      group_size: rows of K in a group.
      order: int32 `[K]`, the group of each row; None means contiguous groups.

    Returns:
      float32 `[K, N]`, exact: the product of an 11-bit scale and an 8-bit integer fits a float32.
    """
    codes_kn = unpack_codes(qweight, bits)
    k, n = codes_kn.shape
    scale_gn = scales.astype(jnp.float32)
    middle = jnp.full(scale_gn.shape, 2 ** (bits - 1), jnp.int32)
    zero_gn = middle if zeros is None else unpack_codes(zeros.T, bits).T
    if order is None:
        grouped = codes_kn.reshape(-1, group_size, n) - zero_gn[:, None, :]
        return (grouped.astype(jnp.float32) * scale_gn[:, None, :]).reshape(k, n)
    return (codes_kn - zero_gn[order]).astype(jnp.float32) * scale_gn[order]


def int4_matmul(
    x: jax.Array,
    qweight: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None = None,
    *,
    group_size: int,
    order: jax.Array | None = None,
    bits: int = 4,
) -> jax.Array:
    """`pallas_kernels.int4_matmul` in the file layout: `x @ dequantize(...)`, the kernel rounded to the dtype of `x`.

    The sum is accumulated in float32, and the result has the dtype of `x`.
    """
    w_kn = dequantize(qweight, scales, zeros, bits=bits, group_size=group_size, order=order).astype(x.dtype)
    return jnp.matmul(x, w_kn, preferred_element_type=jnp.float32).astype(x.dtype)


class BlockResult(NamedTuple):
    """What `gptq_block` finds for R rows and N columns."""

    codes_rn: jax.Array  # uint8 [R, N], unsigned codes
    error_rn: jax.Array  # [R, N], (w - dequantized) / u_kk, to be spread over the rows that follow
    turn_rn: jax.Array  # [R, N], each row as it was when its turn came; [0, N] without a drift


def gptq_block(
    w_rn: jax.Array,
    u_rr: jax.Array,
    scale_rn: jax.Array,
    zero_rn: jax.Array,
    drift_rr: jax.Array | None = None,
    *,
    bits: int,
) -> BlockResult:
    """The steps of `pallas_kernels.gptq_block`, whose arguments and result these are; of any float dtype and any R.

    Each row's update is one product with all errors so far, those of rows yet to come being zero.
    """
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    shared = scale_rn.shape[0] == 1

    def step(k: jax.Array, carry: BlockResult) -> BlockResult:
        # Rows that are yet to come hold a zero error, so that the whole column of U may be used.
        w_n = w_rn[k] - product(u_rr[:, k], carry.error_rn)
        if drift_rr is not None:
            w_n = w_n + product(drift_rr[:, k], carry.turn_rn)
        scale_n, zero_n = (part[0] if shared else part[k] for part in (scale_rn, zero_rn))
        code_n = jnp.clip(jnp.round(w_n / scale_n) + zero_n, 0, 2**bits - 1)
        error_n = (w_n - scale_n * (code_n - zero_n)) / u_rr[k, k]
        put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=k, axis=0)
        turn_rn = carry.turn_rn if drift_rr is None else put(carry.turn_rn, w_n)
        return BlockResult(put(carry.codes_rn, code_n.astype(jnp.uint8)), put(carry.error_rn, error_n), turn_rn)

    # Without a drift nobody reads the rows of the turn, and none are kept.
    turn_rn = jnp.zeros(w_rn.shape if drift_rr is not None else (0, w_rn.shape[1]), w_rn.dtype)
    start = BlockResult(jnp.zeros(w_rn.shape, jnp.uint8), jnp.zeros(w_rn.shape, w_rn.dtype), turn_rn)
    return jax.lax.fori_loop(0, w_rn.shape[0], step, start)
