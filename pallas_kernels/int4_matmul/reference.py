"""Packed products in plain JAX: the kernels' oracle, and what a machine without a GPU runs."""

import jax
import jax.numpy as jnp

from pallas_kernels.packing import unpack_codes


def dequantize(
    qweight: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None = None,
    *,
    bits: int,
    group_size: int,
    group_index: jax.Array | None = None,
) -> jax.Array:
    """Expands a kernel of the file layout: `w[k, n] = scales[g(k), n] * (code[k, n] - zero[g(k), n])`, with g(k) =
    group_index[k] or k // group_size.

    Args:
      qweight: int32 `[K*bits/32, N]`, codes packed along K.
      scales: float `[G, N]`.
      zeros: int32 `[G, N*bits/32]`, zero points packed along N; None means 2^(bits-1) everywhere.
      bits: width of a code.
      group_size: rows of K in a group.
      group_index: int32 `[K]`, the group of each row; None means contiguous groups.

    Returns:
      float32 `[K, N]`, exact: the product of an 11-bit scale and an 8-bit integer fits a float32.
    """
    codes_kn = unpack_codes(qweight, bits)
    k, n = codes_kn.shape
    scale_gn = scales.astype(jnp.float32)
    middle = jnp.full(scale_gn.shape, 2 ** (bits - 1), jnp.int32)
    zero_gn = middle if zeros is None else unpack_codes(zeros.T, bits).T
    if group_index is None:
        grouped = codes_kn.reshape(-1, group_size, n) - zero_gn[:, None, :]
        return (grouped.astype(jnp.float32) * scale_gn[:, None, :]).reshape(k, n)
    return (codes_kn - zero_gn[group_index]).astype(jnp.float32) * scale_gn[group_index]


def int4_matmul(
    x: jax.Array,
    qweight: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None = None,
    *,
    bits: int,
    group_size: int,
    group_index: jax.Array | None = None,
) -> jax.Array:
    """`x @ dequantize(...)`, the kernel rounded to the dtype of `x`; summed in float32, the result in the dtype of `x`."""
    w_kn = dequantize(qweight, scales, zeros, bits=bits, group_size=group_size, group_index=group_index).astype(x.dtype)
    return jnp.matmul(x, w_kn, preferred_element_type=jnp.float32).astype(x.dtype)
