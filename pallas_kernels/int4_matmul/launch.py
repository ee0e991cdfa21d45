"""Products by GPU kernels: which kernel, how it is cut up, and what is expanded instead."""

import jax
import jax.numpy as jnp

from pallas_kernels.int4_matmul import mosaic, prefill, triton
from pallas_kernels.int4_matmul.int4_rows import Int4RowsKernel, from_int4_rows
from pallas_kernels.int4_matmul.planes import RuntimeKernel, dequantize_runtime, expand
from pallas_kernels.int4_matmul.tuning import tiling_of


def product(x: jax.Array, kernel: RuntimeKernel | Int4RowsKernel, *, interpret: bool) -> jax.Array:
    """`x @ W` by the kernel that reads this layout; more rows than it takes are multiplied with the expanded kernel.

    Args:
      x: `[M, K]`.
      kernel: its layout says whose kernel runs: Triton's, or that of Mosaic GPU.
      interpret: whether Triton's kernel runs in Pallas' interpreter.

    Returns:
      `[M, N]` in the dtype of `x`.
    """
    rows = x if kernel.row_order is None else x[:, kernel.row_order]
    padding = ((0, 0), (0, kernel.layout.padded_k - kernel.layout.k))
    if isinstance(kernel, Int4RowsKernel):
        if x.shape[0] <= mosaic.MAX_M:
            return mosaic.product(jnp.pad(rows, padding), kernel)
        return prefill.product(rows, expand(from_int4_rows(kernel)), apart=True)
    tiling = tiling_of(x.shape[0], kernel.layout, x.dtype)
    if tiling is not None:
        return triton.product(jnp.pad(rows, padding), kernel, tiling, interpret=interpret)[:, : kernel.layout.n]
    if interpret:
        return prefill.product(x, dequantize_runtime(kernel), apart=False)
    return prefill.product(rows, expand(kernel), apart=True)
