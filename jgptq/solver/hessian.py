"""The Hessian of a linear's squared output error: `H = 2/T sum_t h_t h_t^T` over calibration tokens (GPTQ, section 3.1)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jgptq.notation import Float, Int

_PANEL = 256


class HessianSum(NamedTuple):
    """A running sum. Only the block upper triangle is meaningful until `hessian` mirrors it, which saves up to half the work."""

    sum_kk: Float[jax.Array, "K K"]  # float32 sum of h h^T, on and above the diagonal
    tokens: Int[jax.Array, ""]  # int32, how many h were summed


def empty(k: int) -> HessianSum:
    """The sum over no tokens."""
    return HessianSum(jnp.zeros((k, k), jnp.float32), jnp.zeros((), jnp.int32))


def accumulate(total: HessianSum, h: Float[jax.Array, "*batch K"]) -> HessianSum:
    """Adds `sum_t h_t h_t^T` over all leading axes of `h`, accumulated in float32 (float32 inputs never through TF32).

    Args:
      total: the sum so far.
      h: activations `[..., K]`, any float dtype.

    Returns:
      The new sum.
    """
    k = h.shape[-1]
    h_tk = h.reshape(-1, k)
    sum_kk = total.sum_kk
    for start in range(0, k, _panel(k)):
        stop = min(start + _panel(k), k)
        panel = jax.lax.dot_general(
            h_tk[:, :stop],
            h_tk[:, start:stop],
            (((0,), (0,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        sum_kk = sum_kk.at[:stop, start:stop].add(panel)
    return HessianSum(sum_kk, total.tokens + h_tk.shape[0])


def hessian(total: HessianSum) -> Float[jax.Array, "K K"]:
    """`2/T` times the mirrored sum, float32 `[K, K]`; zeros where no token was summed."""
    upper = jnp.triu(total.sum_kk)
    full = upper + jnp.triu(total.sum_kk, 1).T
    return full * (2.0 / jnp.maximum(total.tokens, 1).astype(jnp.float32))


def _panel(k: int) -> int:
    """Columns in one panel: at most eight panels, so that the number of matmuls does not grow with K."""
    return max(_PANEL, -(-k // 8))
