"""The decode kernel in Pallas' other lowering, Mosaic GPU, for Hopper: weights from registers into wgmma, loads through TMA.

JAX announces the end of the Triton lowering; this kernel stands beside it and computes the same. A program, one warpgroup, takes
128 output columns (64 where x has more than 64 rows) and a part of K: tiles of codes, x and scales come through a pipeline of
asynchronous copies, codes become bfloat16 in registers, and every group's product is scaled as a whole.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu

from pallas_kernels.int4_matmul.planes import TILE
from pallas_kernels.int4_matmul.rows import RowsKernel

MOST_ROWS = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
    """How a product is cut up."""

    columns: int = 128  # of the output, in a program: 64 or 128
    parts: int = 1  # that K is cut into; divides its tiles
    stages: int = 4  # tiles under way at once


def pipeline_of(m: int, kernel: RowsKernel) -> Pipeline:
    """What is done where nothing was measured: as many parts of K as give every multiprocessor of an H200 a program."""
    columns = 128 if m <= 64 else 64
    programs, tiles = kernel.codes.shape[0] // columns, kernel.layout.tiles
    fits = [parts for parts in (1, 2, 4, 8) if tiles % parts == 0 and tiles // parts >= min(4, tiles)]
    parts = next((parts for parts in fits if programs * parts >= 132), fits[-1])
    return Pipeline(columns=columns, parts=parts)


def product(x: jax.Array, kernel: RowsKernel, pipeline: Pipeline | None = None, *, interpret: Any = None) -> jax.Array:
    """`x @ kernel` for int4 rows.

    Args:
      x: bfloat16 or float16 `[M, padded K]`, M up to 128.
      kernel: from `to_rows`.
      pipeline: how to cut it up; by default what `pipeline_of` says.
      interpret: the interpreter's parameters (`jax.experimental.pallas.mosaic_gpu`), or None for a GPU. The interpreter knows
        neither layouts of registers nor operands in them: there the product of a tile is plain JAX.

    Returns:
      `[M, N]` in the dtype of `x`.

    Raises:
      ValueError: too many rows, or a dtype that the kernel does not take.
    """
    m, layout = x.shape[0], kernel.layout
    if m > MOST_ROWS or x.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"takes up to {MOST_ROWS} rows of bfloat16 or float16, found {m} of {x.dtype}")
    pipeline = pipeline_of(m, kernel) if pipeline is None else pipeline
    width = min(TILE, layout.rows)  # of K, in one product: a group, or a tile of a larger one
    x = jnp.pad(x, ((0, -(-max(m, 8) // 8) * 8 - m), (0, 0)))
    n = kernel.codes.shape[0]
    out = gpu.kernel(
        _body(x.shape[0], width, kernel, pipeline, interpret is not None),
        out_type=jax.ShapeDtypeStruct((pipeline.parts, n, x.shape[0]), jnp.float32),
        grid=(n // pipeline.columns, pipeline.parts),
        grid_names=("columns", "parts"),
        compiler_params=gpu.CompilerParams(lowering_semantics=gpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
        kernel_name="int4_mosaic",
    )(kernel.codes, x, kernel.scales)
    y = out.sum(axis=0).T
    if kernel.zeros is not None:
        # What zero points take from the output is a small product of its own: sums of x over each group, times scale and zero.
        runs = -(-x.shape[1] // layout.rows) * layout.rows - x.shape[1]
        sums_mr = jnp.pad(x, ((0, 0), (0, runs))).astype(jnp.float32).reshape(x.shape[0], -1, layout.rows).sum(axis=-1)
        zero_rn = kernel.scales.astype(jnp.float32) * kernel.zeros.astype(jnp.float32)
        y = y - jnp.matmul(sums_mr, zero_rn, precision=jax.lax.Precision.HIGHEST)
    return y[:m, : layout.n].astype(x.dtype)


def _body(m: int, width: int, kernel: RowsKernel, pipeline: Pipeline, interpret: bool) -> Any:
    """The kernel, of M rows of x and products over `width` rows of K."""
    columns, rows = pipeline.columns, kernel.layout.rows
    steps = kernel.codes.shape[1] // width // pipeline.parts

    def cast(value: jax.Array, layout: Any) -> jax.Array:
        return value if interpret else gpu.layout_cast(value, layout)

    def multiplied(w_nk: jax.Array, x_ref: Any) -> jax.Array:
        if interpret:
            return jnp.matmul(w_nk, x_ref[...].T, preferred_element_type=jnp.float32)

        def scope(acc_ref: Any) -> jax.Array:
            gpu.wgmma(acc_ref, w_nk, gpu.transpose_ref(x_ref, (1, 0)))
            gpu.wgmma_wait(0)
            return acc_ref[...]

        return pl.run_scoped(scope, gpu.ACC((columns, m), jnp.float32))  # type: ignore[attr-defined]

    def body(w_ref: Any, x_ref: Any, scale_ref: Any, out_ref: Any) -> None:
        column, part = jax.lax.axis_index("columns"), jax.lax.axis_index("parts")

        def step(_: Any, w_smem: Any, x_smem: Any, scale_smem: Any, acc: jax.Array) -> jax.Array:
            found = multiplied(w_smem[...].astype(x_smem.dtype), x_smem)
            scale_n = cast(scale_smem[0], gpu.Layout.WGMMA.reduce(1)).astype(jnp.float32)
            return acc + found * jax.lax.broadcast_in_dim(scale_n, (columns, m), (0,))

        acc = gpu.emit_pipeline(
            step,
            grid=(steps,),
            in_specs=[
                gpu.BlockSpec((columns, width), lambda i: (column, part * steps + i), transforms=_swizzled(4 * width, 4)),
                gpu.BlockSpec((m, width), lambda i: (0, part * steps + i), transforms=_swizzled(16 * width, 16)),
                gpu.BlockSpec((1, columns), lambda i: ((part * steps + i) * width // rows, column)),
            ],
            max_concurrent_steps=min(pipeline.stages, steps),
            init_carry=cast(jnp.zeros((columns, m), jnp.float32), gpu.Layout.WGMMA),
        )(w_ref, x_ref, scale_ref)
        out_ref[part, pl.ds(column * columns, columns), :] = acc

    return body


def _swizzled(bits_of_row: int, bits: int) -> tuple[Any, ...]:
    """How a tile lies in shared memory, for wgmma and for loads without conflicts."""
    swizzle = gpu.find_swizzle(bits_of_row)
    if swizzle < 32:
        return ()
    return gpu.TilingTransform((8, 8 * swizzle // bits)), gpu.SwizzleTransform(swizzle)
