"""The factor of the damped Hessian: all that the solver needs, without the inverse of anything.

The published loop reads the upper factor U of the inverse, `H^-1 = U^T U`. With the lower factor L of H itself, `H = L^T L`, that
is `U = L^-T`, and what U does row by row L does block by block, for a quarter of the work: see `jgptq.solver.codes.compensate`.
"""

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jgptq.notation import Bool, Float, Int
from jgptq.solver.codes.sequence import permuted
from jgptq.solver.linalg.triangular import upper_factor

DAMPING_STEP = 10.0
MAX_DAMPING = 1.0
_LANES = 8


Values = TypeVar("Values")


class Factor(NamedTuple, Generic[Values]):
    """A factor of a damped Hessian, and the damping that it took."""

    kk: Values  # triangular `[K, K]`, as an array or in slabs
    damping: Float[jax.Array, ""]  # fraction of the mean diagonal that was added
    finite: Bool[jax.Array, ""]  # False where even the largest damping left a factor that is not finite


def diagonal_blocks(a_kk: Float[jax.Array, "K K"], block: int) -> Float[jax.Array, "C B B"]:
    """The square blocks along the diagonal; B divides K."""
    count = a_kk.shape[0] // block
    at_c = jnp.arange(count)
    return a_kk.reshape(count, block, count, block)[at_c, :, at_c, :]


def all_finite(a_kk: Float[jax.Array, "R K"]) -> Bool[jax.Array, ""]:
    """Whether a matrix holds neither NaN nor infinity, as seen in the sum of its entries: two products, quick to compile."""
    r, k = a_kk.shape
    return jnp.isfinite(jnp.ones((_LANES, r), a_kk.dtype) @ a_kk @ jnp.ones((k, _LANES), a_kk.dtype))[0, 0]


def diagonal(a_kk: Float[jax.Array, "K K"]) -> Float[jax.Array, " K"]:
    """The diagonal, as a strided slice: a gather takes longer to compile and to run."""
    k = a_kk.shape[0]
    return jax.lax.slice(a_kk.reshape(-1), (0,), (k * k,), (k + 1,))


def added_damping(diag_k: Float[jax.Array, " K"], damping: Float[jax.Array, ""]) -> Float[jax.Array, ""]:
    """What a damping adds to each entry of the diagonal: that fraction of the mean of the entries above zero, or of one if none
    is."""
    live_k = diag_k > 0
    mean = jnp.sum(jnp.where(live_k, diag_k, 0.0)) / jnp.maximum(jnp.sum(live_k.astype(diag_k.dtype)), 1.0)
    return damping.astype(diag_k.dtype) * jnp.where(mean > 0, mean, 1.0)


def damped_factor(h_kk: Float[jax.Array, "K K"], damping: float, rows_k: Int[jax.Array, " K"]) -> Factor[jax.Array]:
    """Factors `P (H + lambda mean(diag H) I) P^T = R^T R`, R upper triangular, raising lambda until the factor is finite.

    Rows of K that no token touched are zeros in H: left with the damping alone, they neither give nor take any compensation, and
    the mean is that of the others. Lambda starts at `damping` and is multiplied by 10 up to at most 1; all inside jit.

    Args:
      h_kk: float `[K, K]`, symmetric, finite.
      damping: the first lambda.
      rows_k: int `[K]`, the permutation P: row i of what is factored is row `rows_k[i]` of H.

    Returns:
      The factor, the lambda it needed, and whether it is finite.
    """
    k = h_kk.shape[0]
    diag_k = diagonal(h_kk)

    def attempt(added: jax.Array, _: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        # Every attempt permutes H again. Without the barrier XLA permutes once and keeps that copy in memory next to the factor.
        source_kk, source_k, added = jax.lax.optimization_barrier((h_kk, rows_k, added))
        r_kk = upper_factor(permuted(source_kk, source_k), added)
        finite = jnp.all(jnp.isfinite(diagonal(r_kk)))  # the root of a negative number makes NaN of every entry
        return r_kk.reshape(-1), finite  # flat: a matrix would go through the loop transposed, and be copied back and forth

    first = jnp.float32(damping)
    flat, finite = attempt(added_damping(diag_k, first))
    factor = raised_until_finite(attempt, Factor(flat, first, finite), diag_k, damping)
    return factor._replace(kk=factor.kk.reshape(k, k))


def raised_until_finite(
    attempt: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
    start: Factor[jax.Array],
    diag_k: Float[jax.Array, " K"],
    damping: float,
) -> Factor[jax.Array]:
    """Factors with more and more damping, as a loop inside jit.

    Args:
      attempt: takes what to add to the diagonal, and memory in the form of a factor that was not finite; returns a factor and
        whether it is finite.
      start: the first attempt; or memory for it, not finite and of damping 0.
      diag_k: the undamped diagonal.
      damping: the first lambda.

    Returns:
      The first factor that is finite, or that of the largest damping.
    """
    unit = added_damping(diag_k, jnp.float32(1))

    def next_damping(factor: Factor[jax.Array]) -> jax.Array:
        return jnp.where(factor.damping == 0, jnp.float32(damping), factor.damping * DAMPING_STEP)

    def again(factor: Factor[jax.Array]) -> Factor[jax.Array]:
        fraction = next_damping(factor)
        kk, finite = attempt(fraction.astype(diag_k.dtype) * unit, factor.kk)
        return Factor(kk, fraction, finite)

    return jax.lax.while_loop(lambda factor: ~factor.finite & (next_damping(factor) <= MAX_DAMPING), again, start)
