"""Products of many rows of x: the kernel is expanded into a buffer once, and XLA's matmul does the rest.

A fused kernel loses here: on tensor cores the expansion would be repeated for every tile of rows.
"""

import jax
import jax.numpy as jnp


def product(x: jax.Array, w_kn: jax.Array, *, apart: bool) -> jax.Array:
    """`x @ kernel`, the kernel rounded to the dtype of `x`, accumulated in float32.

    Args:
      x: float `[M, K]`.
      w_kn: the expanded kernel, float32 `[K, N]`, rows in the order of x.
      apart: whether the expansion must not be fused into the matmul: on a GPU it would be repeated there.

    Returns:
      `[M, N]` in the dtype of `x`.
    """
    w_kn = w_kn.astype(x.dtype)
    w_kn = jax.lax.optimization_barrier(w_kn) if apart else w_kn
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.matmul(x, w_kn, preferred_element_type=jnp.float32, precision=precision).astype(x.dtype)
