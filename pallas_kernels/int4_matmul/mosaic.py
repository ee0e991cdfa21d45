"""The decode kernel in Mosaic GPU, Pallas' lowering for Hopper: weights from registers into wgmma, loads through TMA.

JAX announces the end of the Triton lowering; this kernel computes the same without it. A program, one warpgroup, takes 128 output
columns (64 where x has more than 64 rows) and a part of K: tiles of codes, x and scales come through a pipeline of asynchronous
copies, codes become bfloat16 in registers, and every group's product is scaled as a whole.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu

from pallas_kernels.int4_matmul.int4_rows import Int4RowsKernel
from pallas_kernels.int4_matmul.runtime import TILE

MAX_M = 128
"""Rows of x that the kernel takes at most."""
MULTIPROCESSORS = 132
"""Of an H100 and an H200: K is cut until each has a program."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
    """How a product is cut up into programs."""

    block_n: int = 128  # output columns in a program: 64 or 128
    split_k: int = 1  # parts of K; divides its tiles
    num_stages: int = 4  # tiles in flight


def pipeline_of(m: int, kernel: Int4RowsKernel) -> Pipeline:
    """The rule, nothing having been measured: as many parts of K as give every multiprocessor a program."""
    block_n = 128 if m <= 64 else 64
    programs, tiles = kernel.codes.shape[0] // block_n, kernel.layout.tiles
    fits = [split_k for split_k in (1, 2, 4, 8) if tiles % split_k == 0 and tiles // split_k >= min(4, tiles)]
    split_k = next((split_k for split_k in fits if programs * split_k >= MULTIPROCESSORS), fits[-1])
    return Pipeline(block_n=block_n, split_k=split_k)


def product(x: jax.Array, kernel: Int4RowsKernel, pipeline: Pipeline | None = None, *, interpret: Any = None) -> jax.Array:
    """`x @ kernel` for int4 rows.

    Args:
      x: bfloat16 or float16 `[M, padded K]`, M up to 128.
      kernel: from `to_int4_rows`.
      pipeline: how to cut it up; by default what `pipeline_of` says.
      interpret: the interpreter's parameters (`jax.experimental.pallas.mosaic_gpu`), or None for a GPU. The interpreter knows
        neither layouts of registers nor operands in them: there the product of a tile is plain JAX.

    Returns:
      `[M, N]` in the dtype of `x`.

    Raises:
      ValueError: too many rows, or a dtype that the kernel does not take.
    """
    m, layout = x.shape[0], kernel.layout
    if m > MAX_M or x.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"takes up to {MAX_M} rows of bfloat16 or float16, found {m} of {x.dtype}")
    pipeline = pipeline_of(m, kernel) if pipeline is None else pipeline
    width = min(TILE, layout.scale_rows)  # of K, in one product: a group, or a tile of a larger one
    x = jnp.pad(x, ((0, -(-max(m, 8) // 8) * 8 - m), (0, 0)))
    n = kernel.codes.shape[0]
    out = gpu.kernel(
        _body(x.shape[0], width, kernel, pipeline, interpret is not None),
        out_type=jax.ShapeDtypeStruct((pipeline.split_k, n, x.shape[0]), jnp.float32),
        grid=(n // pipeline.block_n, pipeline.split_k),
        grid_names=("columns", "parts"),
        compiler_params=gpu.CompilerParams(lowering_semantics=gpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
        kernel_name="int4_mosaic",
    )(kernel.codes, x, kernel.scales)
    y = out.sum(axis=0).T
    if kernel.zeros is not None:
        # What zero points take from the output is a small product of its own: sums of x over each group, times scale and zero.
        padding = layout.scale_count * layout.scale_rows - x.shape[1]
        x_msr = jnp.pad(x, ((0, 0), (0, padding))).astype(jnp.float32).reshape(x.shape[0], -1, layout.scale_rows)
        zero_sn = kernel.scales.astype(jnp.float32) * kernel.zeros.astype(jnp.float32)
        y = y - jnp.matmul(x_msr.sum(axis=-1), zero_sn, precision=jax.lax.Precision.HIGHEST)
    return y[:m, : layout.n].astype(x.dtype)


def _body(m: int, width: int, kernel: Int4RowsKernel, pipeline: Pipeline, interpret: bool) -> Any:
    """The kernel, of M rows of x and products over `width` rows of K."""
    block_n, scale_rows = pipeline.block_n, kernel.layout.scale_rows
    steps = kernel.codes.shape[1] // width // pipeline.split_k

    def cast(value: jax.Array, layout: Any) -> jax.Array:
        return value if interpret else gpu.layout_cast(value, layout)

    def multiplied(w_nk: jax.Array, x_ref: Any) -> jax.Array:
        if interpret:
            return jnp.matmul(w_nk, x_ref[...].T, preferred_element_type=jnp.float32)

        def scope(acc_ref: Any) -> jax.Array:
            gpu.wgmma(acc_ref, w_nk, gpu.transpose_ref(x_ref, (1, 0)))
            gpu.wgmma_wait(0)
            return acc_ref[...]

        return pl.run_scoped(scope, gpu.ACC((block_n, m), jnp.float32))  # type: ignore[attr-defined]

    def body(w_ref: Any, x_ref: Any, scale_ref: Any, out_ref: Any) -> None:
        column, part = jax.lax.axis_index("columns"), jax.lax.axis_index("parts")

        def step(_: Any, w_smem: Any, x_smem: Any, scale_smem: Any, acc: jax.Array) -> jax.Array:
            product_nm = multiplied(w_smem[...].astype(x_smem.dtype), x_smem)
            scale_n = cast(scale_smem[0], gpu.Layout.WGMMA.reduce(1)).astype(jnp.float32)
            return acc + product_nm * jax.lax.broadcast_in_dim(scale_n, (block_n, m), (0,))

        acc = gpu.emit_pipeline(
            step,
            grid=(steps,),
            in_specs=[
                gpu.BlockSpec((block_n, width), lambda i: (column, part * steps + i), transforms=_swizzled(4 * width, 4)),
                gpu.BlockSpec((m, width), lambda i: (0, part * steps + i), transforms=_swizzled(16 * width, 16)),
                gpu.BlockSpec((1, block_n), lambda i: ((part * steps + i) * width // scale_rows, column)),
            ],
            max_concurrent_steps=min(pipeline.num_stages, steps),
            init_carry=cast(jnp.zeros((block_n, m), jnp.float32), gpu.Layout.WGMMA),
        )(w_ref, x_ref, scale_ref)
        out_ref[part, pl.ds(column * block_n, block_n), :] = acc

    return body


def _swizzled(bits_of_row: int, bits: int) -> tuple[Any, ...]:
    """How a tile lies in shared memory, for wgmma and for loads without conflicts."""
    swizzle = gpu.find_swizzle(bits_of_row)
    if swizzle < 32:
        return ()
    return gpu.TilingTransform((8, 8 * swizzle // bits)), gpu.SwizzleTransform(swizzle)
