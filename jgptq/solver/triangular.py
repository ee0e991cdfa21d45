"""Products with triangular matrices, and of a matrix with itself, that leave out what is zero or would be found twice.

Each splits its triangle into halves, `T = [[T11, T12], [0, T22]]`, down to pieces of at most 1024 rows, and so does little more
than half of the multiplications of a whole product; the pieces are matmuls and run at their speed.
"""

import jax
import jax.numpy as jnp

from jgptq.notation import Float

SMALLEST = 1024
"""Rows of a triangle that is multiplied whole: the smaller, the less is multiplied and the more is compiled and copied."""


def upper_times(t_kk: Float[jax.Array, "K K"], b_kn: Float[jax.Array, "K N"]) -> Float[jax.Array, "K N"]:
    """`T B` for an upper triangular T."""
    k = t_kk.shape[0]
    if k <= SMALLEST:
        return product(t_kk, b_kn)
    half = k // 2
    first_kn = product(t_kk[:half, half:], b_kn[half:]) + upper_times(t_kk[:half, :half], b_kn[:half])
    return jnp.concatenate([first_kn, upper_times(t_kk[half:, half:], b_kn[half:])])


def times_upper(a_nk: Float[jax.Array, "N K"], t_kk: Float[jax.Array, "K K"]) -> Float[jax.Array, "N K"]:
    """`A T` for an upper triangular T."""
    k = t_kk.shape[0]
    if k <= SMALLEST:
        return product(a_nk, t_kk)
    half = k // 2
    second_nk = product(a_nk[:, :half], t_kk[:half, half:]) + times_upper(a_nk[:, half:], t_kk[half:, half:])
    return jnp.concatenate([times_upper(a_nk[:, :half], t_kk[:half, :half]), second_nk], axis=1)


def times_upper_transposed(a_nk: Float[jax.Array, "N K"], t_kk: Float[jax.Array, "K K"]) -> Float[jax.Array, "N K"]:
    """`A T^T` for an upper triangular T."""
    k = t_kk.shape[0]
    if k <= SMALLEST:
        return product(a_nk, t_kk.T)
    half = k // 2
    first_nk = product(a_nk[:, half:], t_kk[:half, half:].T) + times_upper_transposed(a_nk[:, :half], t_kk[:half, :half])
    return jnp.concatenate([first_nk, times_upper_transposed(a_nk[:, half:], t_kk[half:, half:])], axis=1)


def upper_transposed_times(t_kk: Float[jax.Array, "K K"], b_kn: Float[jax.Array, "K N"]) -> Float[jax.Array, "K N"]:
    """`T^T B` for an upper triangular T."""
    k = t_kk.shape[0]
    if k <= SMALLEST:
        return product(transposed(t_kk), b_kn)
    half = k // 2
    second_kn = product(transposed(t_kk[:half, half:]), b_kn[:half]) + upper_transposed_times(t_kk[half:, half:], b_kn[half:])
    return jnp.concatenate([upper_transposed_times(t_kk[:half, :half], b_kn[:half]), second_kn])


def minus_gram(c_kk: Float[jax.Array, "K K"], s_kn: Float[jax.Array, "K N"]) -> Float[jax.Array, "K K"]:
    """`C - S S^T` on the diagonal and above it; what lies below the diagonal's pieces is that of C, and not to be read."""
    k = c_kk.shape[0]
    if k <= SMALLEST:
        return c_kk - product(s_kn, s_kn.T)
    half = k // 2
    above_kk = c_kk[:half, half:] - product(s_kn[:half], s_kn[half:].T)
    first_kk = jnp.concatenate([minus_gram(c_kk[:half, :half], s_kn[:half]), above_kk], axis=1)
    second_kk = jnp.concatenate([c_kk[half:, :half], minus_gram(c_kk[half:, half:], s_kn[half:])], axis=1)
    return jnp.concatenate([first_kk, second_kk])


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """A matmul in full precision on every device."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def transposed(a: jax.Array) -> jax.Array:
    """A transposed factor of a product, laid out as such: a CPU multiplies by one that XLA folded in at half the speed."""
    return jax.lax.optimization_barrier(a.T)
