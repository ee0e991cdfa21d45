"""The upper factor U of the inverse Hessian, `H^-1 = U^T U`, without forming the inverse."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jgptq.notation import Bool, Float

DAMPING_STEP = 10.0
MAX_DAMPING = 1.0


class Factor(NamedTuple):
    """A factor of the damped inverse, and the damping that it took."""

    u_kk: Float[jax.Array, "K K"]  # float32, upper triangular
    damping: Float[jax.Array, ""]  # fraction of the mean diagonal that was added
    finite: Bool[jax.Array, ""]  # False where even the largest damping left a factor that is not finite


def inverse_factor(h_kk: Float[jax.Array, "K K"]) -> Float[jax.Array, "K K"]:
    """Factors the inverse of a positive definite matrix as `H^-1 = U^T U`.

    With P the reversal of rows, `P H P = L L^T` gives `H = R R^T` for the upper triangular `R = P L P`, so `U = R^-1`: one
    Cholesky factorization and one triangular solve, where the textbook route (invert, then factor) takes two factorizations and
    an inverse.

    Args:
      h_kk: float32 `[K, K]`, symmetric.

    Returns:
      Upper triangular U; not finite where H is not positive definite.
    """
    r_kk = jnp.linalg.cholesky(h_kk[::-1, ::-1], symmetrize_input=False)[::-1, ::-1]
    eye = jnp.eye(h_kk.shape[0], dtype=h_kk.dtype)
    return jax.lax.linalg.triangular_solve(r_kk, eye, left_side=True, lower=False)


def damped_inverse_factor(h_kk: Float[jax.Array, "K K"], damping: float) -> Factor:
    """Factors `(H + lambda mean(diag H) I)^-1`, raising lambda until the factor is finite.

    Rows of K that no token touched (a zero on the diagonal) get the mean of the others on their diagonal, so that they neither
    give nor take any compensation. Lambda starts at `damping` and is multiplied by 10 up to at most 1; all inside jit.

    Args:
      h_kk: float32 `[K, K]`, symmetric, finite.
      damping: the first lambda.

    Returns:
      The factor, the lambda it needed, and whether it is finite.
    """
    diag_k = jnp.diagonal(h_kk)
    live_k = diag_k > 0
    mean = jnp.sum(jnp.where(live_k, diag_k, 0.0)) / jnp.maximum(jnp.sum(live_k.astype(jnp.float32)), 1.0)
    mean = jnp.where(mean > 0, mean, 1.0)
    filled_kk = h_kk + jnp.diag(jnp.where(diag_k == 0, mean, 0.0))

    def attempt(fraction: jax.Array) -> Factor:
        u_kk = inverse_factor(filled_kk + fraction * mean * jnp.eye(h_kk.shape[0], dtype=h_kk.dtype))
        return Factor(u_kk, fraction, jnp.all(jnp.isfinite(u_kk)))

    return jax.lax.while_loop(
        lambda factor: ~factor.finite & (factor.damping * DAMPING_STEP <= MAX_DAMPING),
        lambda factor: attempt(factor.damping * DAMPING_STEP),
        attempt(jnp.float32(damping)),
    )
