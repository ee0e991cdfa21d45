"""The upper factor U of the inverse Hessian, `H^-1 = U^T U`, without forming the inverse."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jgptq.notation import Bool, Float

DAMPING_STEP = 10.0
MAX_DAMPING = 1.0
_FACTORED_DIRECTLY = 256


class Factor(NamedTuple):
    """A factor of the damped inverse, and the damping that it took."""

    u_kk: Float[jax.Array, "K K"]  # float32, upper triangular
    damping: Float[jax.Array, ""]  # fraction of the mean diagonal that was added
    finite: Bool[jax.Array, ""]  # False where even the largest damping left a factor that is not finite


def inverse_factor(h_kk: Float[jax.Array, "K K"]) -> Float[jax.Array, "K K"]:
    """Factors the inverse of a positive definite matrix as `H^-1 = U^T U`.

    With P the reversal of rows, `P H P = L L^T` gives `H = R R^T` for the upper triangular `R = P L P`, so `U = R^-1 = P L^-1 P`:
    one inverse Cholesky factor, where the textbook route (factor, invert, factor again) takes three times the work.

    Args:
      h_kk: float32 `[K, K]`, symmetric.

    Returns:
      Upper triangular U; not finite where H is not positive definite.
    """
    return inverse_cholesky(h_kk[::-1, ::-1])[::-1, ::-1]


def inverse_cholesky(a_kk: Float[jax.Array, "K K"]) -> Float[jax.Array, "K K"]:
    """The inverse of the Cholesky factor, `L^-1` with `A = L L^T`, by halves and without L itself.

    With `A = [[A1, B^T], [B, A2]]`: `J1 = L1^-1` from A1; `M = B J1^T`; `J2` from the Schur complement `A2 - M M^T`; then
    `L^-1 = [[J1, 0], [-J2 M J1, J2]]`. All but the smallest pieces is matmuls: 2/3 K^3 multiplications at their speed.

    Args:
      a_kk: float32 `[K, K]`, symmetric.

    Returns:
      Lower triangular; not finite where A is not positive definite.
    """
    k = a_kk.shape[0]
    if k <= _FACTORED_DIRECTLY:
        factor = jnp.linalg.cholesky(a_kk, symmetrize_input=False)
        return jax.lax.linalg.triangular_solve(factor, jnp.eye(k, dtype=a_kk.dtype), left_side=True, lower=True)
    half = k // 2
    upper = inverse_cholesky(a_kk[:half, :half])
    mixed = _product(a_kk[half:, :half], upper.T)
    lower = inverse_cholesky(a_kk[half:, half:] - _product(mixed, mixed.T))
    corner = -_product(lower, _product(mixed, upper))
    return jnp.block([[upper, jnp.zeros((half, k - half), a_kk.dtype)], [corner, lower]])


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


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
    on_diagonal = jnp.eye(h_kk.shape[0], dtype=bool)
    filled_k = jnp.where(diag_k == 0, mean, diag_k)

    def attempt(fraction: jax.Array) -> Factor:
        u_kk = inverse_factor(jnp.where(on_diagonal, (filled_k + fraction * mean)[None, :], h_kk))
        return Factor(u_kk, fraction, jnp.all(jnp.isfinite(u_kk)))

    def next_damping(factor: Factor) -> jax.Array:
        return jnp.where(factor.damping == 0, jnp.float32(damping), factor.damping * DAMPING_STEP)

    # One body serves the first attempt too: the factorization is most of what there is to compile.
    return jax.lax.while_loop(
        lambda factor: ~factor.finite & (next_damping(factor) <= MAX_DAMPING),
        lambda factor: attempt(next_damping(factor)),
        Factor(jnp.zeros_like(h_kk), jnp.float32(0), jnp.bool_(False)),
    )
