"""Products with packed codes: `int4_matmul` in the layout of the files, `int4_matmul_runtime` in that of the GPU kernels.

Here are the checks, the choice of a backend, and the gradient.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.backends import Backend, resolve
from pallas_kernels.int4_matmul import prefill, reference
from pallas_kernels.int4_matmul.int4_rows import Int4RowsKernel, from_int4_rows
from pallas_kernels.int4_matmul.planes import RuntimeKernel, dequantize_runtime
from pallas_kernels.int4_matmul.runtime import check_sizes

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
FILE_BITS = (2, 3, 4, 8)


def int4_matmul(
    x: jax.Array,
    qweight: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None = None,
    *,
    group_size: int,
    group_index: jax.Array | None = None,
    bits: int = 4,
) -> jax.Array:
    """Multiplies with a kernel in the layout of GPTQ files: `x @ W`, `W[k, n] = scales[g(k), n] * (code[k, n] - zero[g(k), n])`.

    W is rounded to the dtype of `x` and the sum accumulated in float32. It is plain JAX on every device, differentiable in x and
    scales; `int4_matmul_runtime` is what runs as a GPU kernel.

    Args:
      x: bfloat16, float16 or float32 `[..., K]`.
      qweight: int32 `[K*bits/32, N]`, codes packed along K (`pallas_kernels.packing`).
      scales: float `[G, N]`.
      zeros: int32 `[G, N*bits/32]`, zero points packed along N; None for a symmetric grid, whose zero point is 2^(bits-1).
      group_size: rows of K in a group, or -1 for all.
      group_index: int32 `[K]`, the group g(k) of each row (`g_idx` of the files); None for contiguous groups.
      bits: width of a code: 2, 3, 4 or 8.

    Returns:
      `[..., N]` in the dtype of `x`.

    Raises:
      ValueError: a width that is not supported, or shapes that do not agree; all of them in one message.

    Example:
      >>> y = int4_matmul(x, qweight, scales, group_size=128)
    """
    k = x.shape[-1]
    group_size = k if group_size == -1 else group_size
    if bits not in FILE_BITS:
        raise ValueError(f"bits must be one of {FILE_BITS}, found {bits}")
    n = qweight.shape[-1]
    check_sizes(k, n, group_size)
    groups = k // group_size
    expected: dict[str, tuple[int, ...]] = {
        "qweight": (k * bits // 32, n),
        "scales": (groups, n),
        "zeros": (groups, n * bits // 32),
        "group_index": (k,),
    }
    _check(x, {"qweight": qweight, "scales": scales, "zeros": zeros, "group_index": group_index}, expected)
    rows = x.reshape(-1, k)
    y = reference.int4_matmul(rows, qweight, scales, zeros, bits=bits, group_size=group_size, group_index=group_index)
    return y.reshape(*x.shape[:-1], n)


def int4_matmul_runtime(x: jax.Array, kernel: RuntimeKernel | Int4RowsKernel, *, backend: Backend = "auto") -> jax.Array:
    """Multiplies with a kernel in a runtime layout, on codes as they are: `x @ dequantize_runtime(kernel)`.

    Sums are accumulated in float32. The GPU kernels multiply with integer codes and scale the sums of each group; plain JAX, and
    every backend for more rows than its kernel takes, rounds the expanded kernel to the dtype of `x` first. Differentiable in x
    alone; the kernel's gradient is zero. Works under `vmap`, and under `shard_map` with a layout that states the shard's sizes.

    Args:
      x: bfloat16, float16 or float32 `[..., K]`.
      kernel: `RuntimeKernel` (`to_runtime`), 4 or 8 bits; or `Int4RowsKernel` (`to_int4_rows`), which backend "mosaic" reads.
      backend: "triton" and "mosaic", kernels on an NVIDIA GPU; "jax", plain JAX; "interpret", the Triton kernel in Pallas'
        interpreter; "auto", see `pallas_kernels.backends.resolve`.

    Returns:
      `[..., N]` in the dtype of `x`.

    Raises:
      ValueError: shapes that do not agree, or a backend that cannot run them.

    Example:
      >>> kernel = to_runtime(qweight, scales, group_size=128)  # once, when weights are loaded
      >>> y = int4_matmul_runtime(x, kernel)
    """
    unfit = None
    if isinstance(kernel, Int4RowsKernel) != (backend == "mosaic"):
        unfit = "reads another layout: Triton's kernels read a RuntimeKernel, those of Mosaic GPU an Int4RowsKernel"
    backend = resolve(backend, unfit)
    if x.shape[-1] != kernel.layout.k:
        raise ValueError(f"x must be [..., {kernel.layout.k}] for this kernel, found {list(x.shape)}")
    _check(x, {name: getattr(kernel, name) for name in kernel.shapes}, kernel.shapes)
    return _product(backend, x.reshape(-1, kernel.layout.k), kernel).reshape(*x.shape[:-1], kernel.layout.n)


def _check(x: jax.Array, parts: dict[str, jax.Array | None], expected: dict[str, tuple[int, ...]]) -> None:
    """Raises a ValueError that names every array whose shape is not the expected one."""
    wrong = [
        f"{name} must be {list(expected[name])} for x {list(x.shape)}, found {list(part.shape)}"
        for name, part in parts.items()
        if part is not None and part.shape != expected[name]
    ]
    if x.dtype not in DTYPES:
        wrong.append(f"x must be bfloat16, float16 or float32, found {x.dtype}")
    if wrong:
        raise ValueError("; ".join(wrong))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(backend: Backend, x: jax.Array, kernel: RuntimeKernel | Int4RowsKernel) -> jax.Array:
    """The product of rows `[M, K]`."""
    if backend == "jax":
        # The kernel is put in the order of x: XLA fails to multiply a permuted bfloat16 x of some shapes on a CPU.
        return prefill.product(x, dequantize_runtime(_in_planes(kernel)), apart=False)
    from pallas_kernels.int4_matmul import launch  # Pallas takes half a second to import

    return launch.product(x, kernel, interpret=backend == "interpret")


def _in_planes(kernel: RuntimeKernel | Int4RowsKernel) -> RuntimeKernel:
    return from_int4_rows(kernel) if isinstance(kernel, Int4RowsKernel) else kernel


def _forward(
    backend: Backend, x: jax.Array, kernel: RuntimeKernel | Int4RowsKernel
) -> tuple[jax.Array, RuntimeKernel | Int4RowsKernel]:
    return _product(backend, x, kernel), kernel


def _backward(_: Backend, kernel: RuntimeKernel | Int4RowsKernel, cotangent: jax.Array) -> tuple[jax.Array, None]:
    """The gradient of x: the cotangent times W transposed."""
    w_kn = dequantize_runtime(_in_planes(kernel))
    precision = jax.lax.Precision.HIGHEST if cotangent.dtype == jnp.float32 else None
    contract_columns = (((1,), (1,)), ((), ()))
    gradient = jax.lax.dot_general(
        cotangent, w_kn.astype(cotangent.dtype), contract_columns, precision=precision, preferred_element_type=jnp.float32
    )
    return gradient.astype(cotangent.dtype), None


_product.defvjp(_forward, _backward)
