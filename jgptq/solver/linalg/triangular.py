"""Triangular systems, and products in full precision, in the order of memory that is fast on a CPU.

LAPACK reads and writes columns first. What is given here in rows is, to LAPACK, the transpose: the functions say so, for
otherwise XLA would copy whole matrices into the other order.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from jgptq.notation import Float


def upper_factor(h_kk: Float[jax.Array, "K K"], added: Float[jax.Array, ""]) -> Float[jax.Array, "K K"]:
    """The Cholesky factor of a positive definite matrix, `H + added I = R^T R`.

    Args:
      h_kk: float `[K, K]`, symmetric.
      added: what is added to the diagonal.

    Returns:
      Upper triangular R; not finite where the sum is not positive definite.
    """
    at_k = jnp.arange(h_kk.shape[0])
    # LAPACK's order of memory, said here: otherwise XLA copies the matrix once more on the way.
    columns_first_kk = with_layout_constraint(h_kk.at[at_k, at_k].add(added).T, Layout(major_to_minor=(1, 0)))
    return jnp.linalg.cholesky(columns_first_kk, symmetrize_input=False).T


def lower_factor(h_kk: Float[jax.Array, "K K"], added: Float[jax.Array, ""]) -> Float[jax.Array, "K K"]:
    """Lower triangular L with `H + added I = L^T L`: the matrix is factored from its last row to its first."""
    return backwards(upper_factor(backwards(h_kk), added))


def backwards(a_kk: Float[jax.Array, "K K"]) -> Float[jax.Array, "K K"]:
    """Rows and columns from last to first."""
    return a_kk[::-1, ::-1]


def inverse_product(r_kk: Float[jax.Array, "K K"], b_kn: Float[jax.Array, "K N"]) -> Float[jax.Array, "K N"]:
    """`(R^T R)^-1 B` for an upper triangular R: the solutions of `Y^T R = B^T` and `X^T R^T = Y^T`."""
    solve_transposed = functools.partial(jax.lax.linalg.triangular_solve, r_kk.T, left_side=False, lower=True)
    return solve_transposed(solve_transposed(b_kn.T, transpose_a=True)).T


def solve(l_kk: Float[jax.Array, "K K"], b_kn: Float[jax.Array, "K N"]) -> Float[jax.Array, "K N"]:
    """X with `L X = B`, for a lower triangular L: the solution of `X^T L^T = B^T`."""
    return jax.lax.linalg.triangular_solve(l_kk.T, b_kn.T, left_side=False, lower=False).T


def transposed_solve(l_kk: Float[jax.Array, "K K"], b_kn: Float[jax.Array, "K N"]) -> Float[jax.Array, "K N"]:
    """X with `L^T X = B`, for a lower triangular L: the solution of `X^T L = B^T`."""
    return jax.lax.linalg.triangular_solve(l_kk.T, b_kn.T, left_side=False, lower=False, transpose_a=True).T


def inverse_transposed(l_cbb: Float[jax.Array, "C B B"]) -> Float[jax.Array, "C B B"]:
    """`L^-T` of small lower triangular matrices."""
    eye = jnp.eye(l_cbb.shape[-1], dtype=l_cbb.dtype)
    # One by one: XLA's batched solve waits forever where as many devices as there are threads run it at once.
    return jax.lax.map(lambda l_bb: transposed_solve(l_bb, eye), l_cbb)


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """A matmul in full precision on every device."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def product_over(a_bk: jax.Array, b_kn: jax.Array, start: jax.Array, stop: jax.Array, size: int) -> jax.Array:
    """`A B` over K from `start` to `stop`, multiples of `size`, for an A of B rows."""

    def add(index: jax.Array, sum_bn: jax.Array) -> jax.Array:
        a_bs = jax.lax.dynamic_slice_in_dim(a_bk, index * size, size, axis=1)
        return sum_bn + product(a_bs, jax.lax.dynamic_slice_in_dim(b_kn, index * size, size))

    zeros_bn = jnp.zeros((a_bk.shape[0], b_kn.shape[1]), b_kn.dtype)
    return jax.lax.fori_loop(start // size, stop // size, add, zeros_bn)


def transposed(a: jax.Array) -> jax.Array:
    """A transposed factor of a product, laid out as such: a CPU multiplies by one that XLA folded in at half the speed."""
    return jax.lax.optimization_barrier(a.T)
