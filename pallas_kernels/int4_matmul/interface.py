"""The one door to products with packed codes: checks, the choice of a backend, and the gradient."""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.device import Backend, resolve
from pallas_kernels.int4_matmul import mosaic, prefill, reference, triton
from pallas_kernels.int4_matmul.planes import Planes, RuntimeKernel, check_sizes, expanded
from pallas_kernels.int4_matmul.rows import Rows, RowsKernel, from_rows
from pallas_kernels.int4_matmul.tuning import tiling_of

Layout = Literal["file"] | Planes


class _Static(NamedTuple):
    """What a product in the runtime layout is compiled for."""

    layout: Planes
    backend: Backend


class _Operands(NamedTuple):
    """The arrays of a kernel."""

    qweight: jax.Array
    scales: jax.Array
    zeros: jax.Array | None
    order: jax.Array | None


def int4_matmul(
    x: jax.Array,
    qweight: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None = None,
    *,
    group_size: int,
    order: jax.Array | None = None,
    layout: Layout = "file",
    bits: int = 4,
    backend: Backend = "auto",
) -> jax.Array:
    """Multiplies with packed group-wise codes: `x @ W`, `W[k, n] = scale[g(k), n] * (code[k, n] - zero[g(k), n])`.

    Sums are accumulated in float32. Differentiable in x, whose gradient is the product with W transposed; scales have a gradient
    in the file layout alone, in the runtime layout it is zero. The GPU kernels multiply with codes as they are and scale sums;
    elsewhere W is rounded to the dtype of `x` first.

    Args:
      x: bfloat16, float16 or float32 `[..., K]`.
      qweight: int32; `[K*bits/32, N]` in the file layout, `RuntimeKernel.qweight` in the runtime layout.
      scales: float; `[G, N]`, or `RuntimeKernel.scales`.
      zeros: None for a symmetric grid; int32 `[G, N*bits/32]`, or `RuntimeKernel.zeros`.
      group_size: rows of K in a group of the file, or -1 for all.
      order: None for contiguous groups; the group of each row, int32 `[K]`; in the runtime layout `RuntimeKernel.order`.
      layout: "file", or the layout that the arrays are in: `Planes` (`planes.to_runtime`), which Triton's kernels
        read, or `Rows` (`rows.to_rows`, int4 codes as `qweight`), which those of Mosaic GPU do.
      bits: width of a code: 2, 3, 4 or 8; the runtime layout holds 4 and 8.
      backend: "triton" and "mosaic", the kernels on an NVIDIA GPU; "jax", plain JAX; "interpret", Triton's kernels in Pallas'
        interpreter; "auto", what `pallas_kernels.device.resolve` says.

    Returns:
      `[..., N]` in the dtype of `x`.

    Raises:
      ValueError: shapes that do not agree, a layout that contradicts them, a backend that cannot run them.
    """
    k = x.shape[-1]
    group_size = k if group_size == -1 else group_size
    backend = resolve(backend, _unfit(backend, layout))
    operands = _Operands(qweight, scales, zeros, order)
    _check(x, operands, group_size, layout, bits)
    rows = x.reshape(-1, k)
    if layout == "file":
        found = reference.int4_matmul(rows, qweight, scales, zeros, group_size=group_size, order=order, bits=bits)
    else:
        found = _product(_Static(layout, backend), rows, operands)
    return found.reshape(*x.shape[:-1], -1)


def _unfit(backend: Backend, layout: Layout) -> str | None:
    """Why a backend's kernels cannot read a layout, or None."""
    if layout == "file":
        return "reads the runtime layout; convert with pallas_kernels.int4_matmul.planes.to_runtime"
    if isinstance(layout, Rows) != (backend == "mosaic"):
        return "reads another layout: Triton's kernels read Planes, those of Mosaic GPU Rows"
    return None


def _check(x: jax.Array, operands: _Operands, group_size: int, layout: Layout, bits: int) -> None:
    """Raises a ValueError that names every pair of shapes that do not agree."""
    qweight, scales, zeros, order = operands
    k = x.shape[-1]
    expected: dict[str, tuple[int, ...]]
    if layout == "file":
        if bits not in (2, 3, 4, 8):
            raise ValueError(f"bits must be 2, 3, 4 or 8, found {bits}")
        n = qweight.shape[-1]
        check_sizes(k, n, group_size)
        groups = k // group_size
        expected = {"qweight": (k * bits // 32, n), "scales": (groups, n), "zeros": (groups, n * bits // 32), "order": (k,)}
    else:
        facts = {"K": (k, layout.k), "bits": (bits, layout.bits), "group_size": (group_size, layout.group_size)}
        if wrong := [f"{name} is {found}, the layout's is {held}" for name, (found, held) in facts.items() if found != held]:
            raise ValueError("; ".join(wrong))
        columns = layout.filled_n if isinstance(layout, Rows) else layout.padded_n
        of_rows = (-(-layout.padded_k // layout.rows), columns)
        words = (columns, layout.padded_k) if isinstance(layout, Rows) else (layout.tiles * layout.words, columns)
        expected = {"qweight": words, "scales": of_rows, "zeros": of_rows, "order": (k,)}
    parts = {"qweight": qweight, "scales": scales, "zeros": zeros, "order": order}
    wrong = [
        f"{name} must be {list(expected[name])} for x {list(x.shape)}, found {list(part.shape)}"
        for name, part in parts.items()
        if part is not None and part.shape != expected[name]
    ]
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        wrong.append(f"x must be bfloat16, float16 or float32, found {x.dtype}")
    if wrong:
        raise ValueError("; ".join(wrong))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(static: _Static, x: jax.Array, operands: _Operands) -> jax.Array:
    """The product of rows `[M, K]`."""
    if static.backend == "jax":
        # The kernel is put in the order of x: XLA fails to multiply a permuted bfloat16 x of some shapes on a CPU.
        return prefill.product(x, _in_order(_runtime(static.layout, operands)), apart=False)
    x = x if operands.order is None else x[:, operands.order]
    fills = ((0, 0), (0, static.layout.padded_k - static.layout.k))
    if static.backend == "mosaic" and x.shape[0] <= mosaic.MOST_ROWS:
        return mosaic.product(jnp.pad(x, fills), _rows(static.layout, operands))
    kernel = _runtime(static.layout, operands)
    if static.backend == "mosaic":
        return prefill.product(x, expanded(kernel), apart=True)
    tiling = tiling_of(x.shape[0], kernel.layout, x.dtype)
    if tiling is None:
        return prefill.product(x, expanded(kernel), apart=static.backend == "triton")
    x = jnp.pad(x, fills)
    interpret = static.backend == "interpret"
    found = triton.product(x, kernel.qweight, kernel.scales, kernel.zeros, kernel.layout, tiling, interpret=interpret)
    return found[:, : kernel.layout.n]


def _rows(layout: Planes, operands: _Operands) -> RowsKernel:
    if not isinstance(layout, Rows):
        raise TypeError(f"expected int4 rows, found {layout}")
    codes, scales, zeros, order = operands
    return RowsKernel(codes=codes, scales=scales, zeros=zeros, order=order, layout=layout)


def _runtime(layout: Planes, operands: _Operands) -> RuntimeKernel:
    """The kernel in planes, whichever runtime layout it is in."""
    if isinstance(layout, Rows):
        return from_rows(_rows(layout, operands))
    qweight, scales, zeros, order = operands
    return RuntimeKernel(qweight=qweight, scales=scales, zeros=zeros, order=order, layout=layout)


def _in_order(kernel: RuntimeKernel) -> jax.Array:
    """The expanded kernel, rows as in the file."""
    w_kn = expanded(kernel)
    return w_kn if kernel.order is None else w_kn[jnp.argsort(kernel.order)]


def _forward(static: _Static, x: jax.Array, operands: _Operands) -> tuple[jax.Array, _Operands]:
    return _product(static, x, operands), operands


def _backward(static: _Static, operands: _Operands, pull: jax.Array) -> tuple[jax.Array, None]:
    """The gradient of x: the pull times W transposed."""
    w_kn = _in_order(_runtime(static.layout, operands))
    precision = jax.lax.Precision.HIGHEST if pull.dtype == jnp.float32 else None
    contract_columns = (((1,), (1,)), ((), ()))
    found = jax.lax.dot_general(
        pull, w_kn.astype(pull.dtype), contract_columns, precision=precision, preferred_element_type=jnp.float32
    )
    return found.astype(pull.dtype), None


_product.defvjp(_forward, _backward)
