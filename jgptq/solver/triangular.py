"""Systems with lower triangular matrices, and products of a matrix with itself, that leave out what is zero or known by symmetry.

Each splits its triangle into halves, `L = [[L11, 0], [L21, L22]]`, down to small pieces: nearly all of the work is matmuls of
large blocks, at their speed, and about half of that of whole matrices.
"""

import jax
import jax.numpy as jnp

from jgptq.notation import Float

_SOLVED_DIRECTLY = 512
_MULTIPLIED_WHOLE = 1024
"""Rows of pieces that are not split: the smaller, the less is multiplied and the more is compiled and copied."""


def solve(l_kk: Float[jax.Array, "K K"], b_kn: Float[jax.Array, "K N"]) -> Float[jax.Array, "K N"]:
    """X with `L X = B`, for a lower triangular L."""
    k = l_kk.shape[0]
    if k <= _SOLVED_DIRECTLY:
        return _solved_directly(l_kk, b_kn, transpose=False)
    half = k // 2
    first_kn = solve(l_kk[:half, :half], b_kn[:half])
    second_kn = solve(l_kk[half:, half:], b_kn[half:] - product(l_kk[half:, :half], first_kn))
    return jnp.concatenate([first_kn, second_kn])


def transposed_solve(l_kk: Float[jax.Array, "K K"], b_kn: Float[jax.Array, "K N"]) -> Float[jax.Array, "K N"]:
    """X with `L^T X = B`, for a lower triangular L."""
    k = l_kk.shape[0]
    if k <= _SOLVED_DIRECTLY:
        return _solved_directly(l_kk, b_kn, transpose=True)
    half = k // 2
    second_kn = transposed_solve(l_kk[half:, half:], b_kn[half:])
    first_kn = transposed_solve(l_kk[:half, :half], b_kn[:half] - product(transposed(l_kk[half:, :half]), second_kn))
    return jnp.concatenate([first_kn, second_kn])


def _solved_directly(l_kk: jax.Array, b_kn: jax.Array, *, transpose: bool) -> jax.Array:
    """LAPACK reads and writes columns first: `X^T L^T = B^T`, of transposes that are so in memory, leaves all in place."""
    x_nk = jax.lax.linalg.triangular_solve(l_kk.T, b_kn.T, left_side=False, lower=False, transpose_a=transpose)
    return x_nk.T


def minus_gram(c_kk: Float[jax.Array, "K K"], s_nk: Float[jax.Array, "N K"]) -> Float[jax.Array, "K K"]:
    """`C - S^T S` on the diagonal and below it; what lies above the diagonal's pieces is that of C, and not to be read."""
    k = c_kk.shape[0]
    if k <= _MULTIPLIED_WHOLE:
        return c_kk - product(transposed(s_nk), s_nk)
    half = k // 2
    below_kk = c_kk[half:, :half] - product(transposed(s_nk[:, half:]), s_nk[:, :half])
    first_kk = jnp.concatenate([minus_gram(c_kk[:half, :half], s_nk[:, :half]), c_kk[:half, half:]], axis=1)
    second_kk = jnp.concatenate([below_kk, minus_gram(c_kk[half:, half:], s_nk[:, half:])], axis=1)
    return jnp.concatenate([first_kk, second_kk])


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """A matmul in full precision on every device."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def transposed(a: jax.Array) -> jax.Array:
    """A transposed factor of a product, laid out as such: a CPU multiplies by one that XLA folded in at half the speed."""
    return jax.lax.optimization_barrier(a.T)
