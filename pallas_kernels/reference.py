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
    """Multiplies with a packed group-wise kernel; equivalent to `x @ dequantize(qweight, scales, zeros, ...)`.

    The kernel is rounded to the dtype of `x`, the sum is accumulated in float32, and the result has the dtype of `x`.

    Args:
      x: float `[..., K]`.
      qweight: int32 `[K*bits/32, N]`.
      scales: float `[G, N]`.
      zeros: int32 `[G, N*bits/32]`, or None for a symmetric grid.
      group_size: rows of K in a group.
      order: int32 `[K]`, the group of each row, or None for contiguous groups.
      bits: width of a code.

    Returns:
      `[..., N]` in the dtype of `x`.
    """
    w_kn = dequantize(qweight, scales, zeros, bits=bits, group_size=group_size, order=order).astype(x.dtype)
    return jnp.matmul(x, w_kn, preferred_element_type=jnp.float32).astype(x.dtype)


class BlockResult(NamedTuple):
    """What `gptq_block` finds for R rows and N columns."""

    codes_rn: jax.Array  # uint8 [R, N], unsigned codes
    error_rn: jax.Array  # float32 [R, N], (w - dequantized) / u_kk, to be spread over the rows that follow


def gptq_block(w_rn: jax.Array, u_rr: jax.Array, scale_n: jax.Array, zero_n: jax.Array, *, bits: int) -> BlockResult:
    """Quantizes R rows in sequence, each compensating the error of those before it (GPTQ, Frantar et al. 2022, algorithm 1).

    For k = 0..R-1: `code_k = clip(round(w_k / scale) + zero)`, `e_k = (w_k - scale * (code_k - zero)) / u[k, k]`, and
    `w_j -= u[k, j] * e_k` for every later row j. All rows share one scale and one zero point for each column. Rounding is half to
    even, the division a true division.

    Args:
      w_rn: float32 `[R, N]`, rows as updated by all rows before this block.
      u_rr: float32 `[R, R]`, the diagonal block of the upper factor U, H^-1 = U^T U.
      scale_n: float32 `[N]`.
      zero_n: float32 `[N]`, integers.
      bits: width of a code.

    Returns:
      The codes, and the errors that the caller spreads over the rows after this block.
    """

    def step(k: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        error_rn, codes_rn = carry
        # Rows that are yet to come hold a zero error, so that the whole column of U may be used.
        w_n = w_rn[k] - jnp.matmul(u_rr[:, k], error_rn, precision=jax.lax.Precision.HIGHEST)
        code_n = jnp.clip(jnp.round(w_n / scale_n) + zero_n, 0, 2**bits - 1)
        error_n = (w_n - scale_n * (code_n - zero_n)) / u_rr[k, k]
        put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=k, axis=0)
        return put(error_rn, error_n), put(codes_rn, code_n.astype(jnp.uint8))

    start = jnp.zeros(w_rn.shape, jnp.float32), jnp.zeros(w_rn.shape, jnp.uint8)
    error_rn, codes_rn = jax.lax.fori_loop(0, w_rn.shape[0], step, start)
    return BlockResult(codes_rn, error_rn)
