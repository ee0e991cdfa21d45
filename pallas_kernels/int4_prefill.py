"""Products of many rows of x: the kernel is expanded into a buffer once, and XLA's matmul does the rest.

A fused kernel loses here: on tensor cores the expansion would be repeated for every tile of rows.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.planes import RuntimeKernel, expanded


def product(x: jax.Array, kernel: RuntimeKernel) -> jax.Array:
    """`x @ kernel`, the kernel rounded to the dtype of `x`, accumulated in float32.

    Args:
      x: float `[M, K]`, columns in the runtime's order of rows.
      kernel: in the runtime layout.

    Returns:
      `[M, N]` in the dtype of `x`.
    """
    # Without the barrier XLA may fuse the expansion into its matmul, and repeat it there.
    w_kn = jax.lax.optimization_barrier(expanded(kernel).astype(x.dtype))
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.matmul(x, w_kn, preferred_element_type=jnp.float32, precision=precision).astype(x.dtype)
