"""Triangular systems, and products in full precision, in the order of memory that is fast on a CPU.

LAPACK reads and writes columns first. What is given here in rows is, to LAPACK, the transpose: the functions say so, for
otherwise XLA would copy whole matrices into the other order.
"""

import jax
import jax.numpy as jnp

from jgptq.notation import Float


def lower_factor(h_kk: Float[jax.Array, "K K"], added_k: Float[jax.Array, " K"]) -> Float[jax.Array, "K K"]:
    """Factors a positive definite matrix as `H + diag(added) = L^T L`, the Cholesky factorization from the last row to the first.

    With P the reversal of rows, `P (H + diag(added)) P = C C^T` gives `L = P C^T P`.

    Args:
      h_kk: float `[K, K]`, symmetric; one triangle is read.
      added_k: what is added to its diagonal.

    Returns:
      Lower triangular L; not finite where the sum is not positive definite.
    """
    damped_kk = jnp.where(jnp.eye(h_kk.shape[0], dtype=bool), h_kk + added_k[None, :], h_kk)
    return jnp.linalg.cholesky(damped_kk[::-1, ::-1].T, symmetrize_input=False)[::-1, ::-1].T


def solve(l_kk: Float[jax.Array, "K K"], b_kn: Float[jax.Array, "K N"]) -> Float[jax.Array, "K N"]:
    """X with `L X = B`, for a lower triangular L: the solution of `X^T L^T = B^T`."""
    return jax.lax.linalg.triangular_solve(l_kk.T, b_kn.T, left_side=False, lower=False).T


def transposed_solve(l_kk: Float[jax.Array, "K K"], b_kn: Float[jax.Array, "K N"]) -> Float[jax.Array, "K N"]:
    """X with `L^T X = B`, for a lower triangular L: the solution of `X^T L = B^T`."""
    return jax.lax.linalg.triangular_solve(l_kk.T, b_kn.T, left_side=False, lower=False, transpose_a=True).T


def inverse_transposed(l_cbb: Float[jax.Array, "C B B"]) -> Float[jax.Array, "C B B"]:
    """`L^-T` of small lower triangular matrices, all at once."""
    eye = jnp.broadcast_to(jnp.eye(l_cbb.shape[-1], dtype=l_cbb.dtype), l_cbb.shape)
    return jax.lax.linalg.triangular_solve(l_cbb, eye, left_side=True, lower=True, transpose_a=True)


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """A matmul in full precision on every device."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def transposed(a: jax.Array) -> jax.Array:
    """A transposed factor of a product, laid out as such: a CPU multiplies by one that XLA folded in at half the speed."""
    return jax.lax.optimization_barrier(a.T)
