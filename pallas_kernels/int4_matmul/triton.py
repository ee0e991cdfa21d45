"""Products of few rows of x with codes in the runtime layout, as Pallas kernels that Triton lowers for NVIDIA GPUs.

A program takes a run of output columns and a part of K, tile by tile: one load of words, then one product for every plane, with
another slice of x. Scales are applied once per group, to float32 partial sums; a zero point, one more product per group, to sums
of x that are made beforehand. Parts of K are added in a second pass, always in the same order, or by atomics on request.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as gpu

from pallas_kernels.assembly import elementwise
from pallas_kernels.int4_matmul.planes import Planes, RuntimeKernel
from pallas_kernels.int4_matmul.runtime import TILE

Form = Literal["gemv", "planes", "swapped"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """How a product is cut up into programs."""

    form: Form  # a sum of products row by row; x the left operand; the weights the left operand, which wgmma reads from registers
    block_m: int  # rows of x in a program: 1 to 4 for gemv, else a power of two from 16 on
    block_n: int  # output columns in a program; a power of two
    split_k: int  # parts of K; divides its tiles
    num_warps: int
    num_stages: int  # of the software pipeline of loads
    atomics: bool = False  # parts are added as they finish: one pass, and sums whose last bits differ from run to run


def product(x: jax.Array, kernel: RuntimeKernel, tiling: Tiling, *, interpret: bool) -> jax.Array:
    """`x @ kernel` for a kernel in planes.

    Args:
      x: bfloat16, float16 or float32 `[M, padded K]`, in the runtime's order of rows.
      kernel: from `to_runtime`.
      tiling: how to cut it up; `block_n` divides padded N and `split_k` the tiles of K.
      interpret: whether to run in Pallas' interpreter.

    Returns:
      `[M, padded N]` in the dtype of `x`.
    """
    layout, zeros = kernel.layout, kernel.zeros
    m, n = x.shape[0], kernel.qweight.shape[1]
    padded_m = -(-m // tiling.block_m) * tiling.block_m
    x = jnp.pad(x, ((0, padded_m - m), (0, 0)))
    several = tiling.split_k > 1
    operands = [x, kernel.qweight, kernel.scales]
    if zeros is not None:
        # What a zero point of one takes from the output, scale aside: per group, or per tile where groups are larger.
        runs = x.astype(jnp.float32).reshape(padded_m, -1, min(layout.scale_rows, TILE))
        operands += [zeros, runs.sum(axis=-1)]
    shape = (padded_m, n) if not several or tiling.atomics else (tiling.split_k, padded_m, n)
    dtype = jnp.dtype(jnp.float32) if several else x.dtype
    aliases = {}
    if several and tiling.atomics:
        operands.append(jnp.zeros(shape, dtype))
        aliases = {len(operands) - 1: 0}
    body = functools.partial(
        _kernel, layout=layout, tiling=tiling, has_zeros=zeros is not None, has_start=bool(aliases), interpret=interpret
    )
    out = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(shape, dtype),
        grid=(n // tiling.block_n, tiling.split_k, padded_m // tiling.block_m),
        input_output_aliases=aliases,
        interpret=interpret,
        compiler_params=gpu.CompilerParams(num_warps=tiling.num_warps, num_stages=tiling.num_stages),
        name=f"int{layout.bits}_{tiling.form}",
    )(*operands)
    if several and not tiling.atomics:
        out = out.sum(axis=0)
    return out[:m].astype(x.dtype)


def _kernel(*refs: Any, layout: Planes, tiling: Tiling, has_zeros: bool, has_start: bool, interpret: bool) -> None:
    """One program: some columns, some tiles of K, some rows of x."""
    *given, out_ref = refs
    given = given[:-1] if has_start else given
    x_ref, q_ref, s_ref, *zero_refs = given
    columns = pl.ds(pl.program_id(0) * tiling.block_n, tiling.block_n)
    part = pl.program_id(1)
    rows = pl.ds(pl.program_id(2) * tiling.block_m, tiling.block_m)
    tiles = layout.tiles // tiling.split_k
    inner = _gemv_group if tiling.form == "gemv" else functools.partial(_dot_group, swapped=tiling.form == "swapped")
    in_tile = max(1, TILE // layout.scale_rows)  # groups
    planes = layout.planes // in_tile  # in a group
    flip = tiling.form == "swapped"

    def run_tile(index: jax.Array, acc: jax.Array) -> jax.Array:
        tile = part * tiles + index
        words = gpu.load(q_ref.at[pl.ds(tile * layout.words, layout.words), columns])
        for group in range(in_tile):
            row = tile * in_tile + group if in_tile > 1 else tile * TILE // layout.scale_rows
            taken = range(group * planes, (group + 1) * planes)
            sums = inner(x_ref, rows, words, tile * TILE, taken, layout, interpret)
            scale = gpu.load(s_ref.at[row, columns]).astype(jnp.float32)
            if has_zeros:
                zero_ref, total_ref = zero_refs
                zero = gpu.load(zero_ref.at[row, columns]).astype(jnp.float32)
                total = gpu.load(total_ref.at[rows, tile * in_tile + group])
                sums = sums - (zero[:, None] * total[None, :] if flip else total[:, None] * zero[None, :])
            acc = acc + sums * (scale[:, None] if flip else scale[None, :])
        return acc

    shape = (tiling.block_n, tiling.block_m) if flip else (tiling.block_m, tiling.block_n)
    acc = jax.lax.fori_loop(0, tiles, run_tile, jnp.zeros(shape, jnp.float32))
    acc = acc.T if flip else acc
    if tiling.split_k == 1:
        gpu.store(out_ref.at[rows, columns], acc.astype(out_ref.dtype))
    elif tiling.atomics:
        gpu.atomic_add(out_ref, (rows, columns), acc)
    else:
        gpu.store(out_ref.at[part, rows, columns], acc)


def _dot_group(
    x_ref: Any, rows: Any, words: jax.Array, start: jax.Array, planes: range, layout: Planes, interpret: bool, *, swapped: bool
) -> jax.Array:
    """The products of some planes of a tile, summed: `[rows, columns]`, or its transpose."""
    words = words.T if swapped else words
    sums = None
    for plane in planes:
        w = codes(words, plane, layout.bits, x_ref.dtype, interpret)
        x = gpu.load(x_ref.at[rows, pl.ds(start + plane * layout.words, layout.words)])
        product_of_plane = _dot(w, x.T) if swapped else _dot(x, w)
        sums = product_of_plane if sums is None else sums + product_of_plane
    if sums is None:
        raise ValueError("a group holds at least one plane")
    return sums


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    # Float32 operands are multiplied as such, never through TF32.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, preferred_element_type=jnp.float32, precision=precision)


def _gemv_group(
    x_ref: Any, rows: Any, words: jax.Array, start: jax.Array, planes: range, layout: Planes, interpret: bool
) -> jax.Array:
    """The products of some planes of a tile without a matrix unit, `[rows, columns]`."""
    weights = [(plane, wide_codes(words, plane, layout.bits, interpret)) for plane in planes]
    sums_of_rows = []
    for row in range(rows.size):
        sums = jnp.zeros(words.shape, jnp.float32)
        for plane, w in weights:
            x = gpu.load(x_ref.at[rows.start + row, pl.ds(start + plane * layout.words, layout.words)])
            sums = _fused(w, x.astype(jnp.float32)[:, None], sums, interpret)
        sums_of_rows.append(sums.sum(axis=0)[None, :])
    return sums_of_rows[0] if len(sums_of_rows) == 1 else _stacked(sums_of_rows)


def _stacked(rows: list[jax.Array]) -> jax.Array:
    """Rows `[1, n]` as one array, put together by masks: Triton has no concatenation."""
    count = 1 << (len(rows) - 1).bit_length()
    index = jax.lax.broadcasted_iota(jnp.int32, (count, 1), 0)
    whole = jnp.zeros((count, rows[0].shape[1]), jnp.float32)
    for number, row in enumerate(rows):
        whole = jnp.where(index == number, row, whole)
    return whole


def codes(words: jax.Array, plane: int, bits: int, dtype: Any, interpret: bool) -> jax.Array:
    """The codes of a plane less 2^(bits-1), in a float dtype, exact.

    A 16-bit float of the right exponent holds a 4-bit code in its lowest bits, so that none is converted: bfloat16
    `0x4300 | n` is 128 + n, float16 `0x6400 | n` is 1024 + n. The assembly takes two words at once and first puts
    one half of each into a register; so two codes cost a shift, one logical operation and one subtraction. Bytes become the
    mantissa of a float32.
    """
    if interpret or dtype == jnp.float32:
        whole = (words >> (bits * plane)) & (2**bits - 1)
        return (whole - 2 ** (bits - 1)).astype(dtype)
    assembly = _nibbles if bits == 4 else _bytes
    [plane_codes] = gpu.elementwise_inline_asm(
        assembly(plane, "bf16" if dtype == jnp.bfloat16 else "f16"),
        args=[words],
        constraints="=r,r,r",
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(words.shape, dtype)],
    )
    return plane_codes


def _nibbles(plane: int, name: str) -> str:
    magic, middle = {"bf16": ("0x43004300", "0x43084308"), "f16": ("0x64006400", "0x64086408")}[name]
    halves, shift = ("0x5410" if plane < 4 else "0x7632"), 4 * (plane % 4)
    move = f"shr.b32 t, t, {shift};\n" if shift else ""
    return f"""{{ .reg .b32 t, c;
mov.b32 c, {middle};
prmt.b32 t, $1, $2, {halves};
{move}lop3.b32 t, t, 0x000F000F, {magic}, 0xEA;
sub.{name}x2 $0, t, c; }}"""


def _bytes(plane: int, name: str) -> str:
    # 0x4B000000 is 2^23 in float32: with a byte as its lowest it is 2^23 + n, and 0x4B000080 is 2^23 + 128.
    return f"""{{ .reg .b32 a, b; .reg .f32 f, g;
prmt.b32 a, $1, 0x4B000000, 0x744{plane};
prmt.b32 b, $2, 0x4B000000, 0x744{plane};
mov.b32 f, a;
mov.b32 g, b;
sub.f32 f, f, 0f4B000080;
sub.f32 g, g, 0f4B000080;
cvt.rn.{name}x2.f32 $0, g, f; }}"""


def wide_codes(words: jax.Array, plane: int, bits: int, interpret: bool) -> jax.Array:
    """The codes of a plane less 2^(bits-1) in float32, exact, without a conversion.

    Under an exponent of 23 - j, bits j and up of a float32 count ones: a nibble at bit 16 is added to 128, one at bit 12 to
    2048. So two planes share a shift. A byte is put at bit 0, which adds it to 2^23.
    """
    if interpret:
        return codes(words, plane, bits, jnp.float32, interpret)
    at = 0 if bits == 8 else 16 if plane % 2 else 12
    shift = at - bits * plane
    move = f"shl.b32 t, $1, {shift};" if shift > 0 else f"shr.b32 t, $1, {-shift};"
    middle = _float_bits(2.0 ** (23 - at) + 2 ** (bits - 1))
    assembly = f"""{{ .reg .b32 t; .reg .f32 f;
{move}
lop3.b32 t, t, {(2**bits - 1) << at}, {(150 - at) << 23}, 0xEA;
mov.b32 f, t;
sub.f32 $0, f, 0f{middle:08X}; }}"""
    return elementwise(assembly, "=f,r", [words])


def _fused(a: jax.Array, b: jax.Array, c: jax.Array, interpret: bool) -> jax.Array:
    """`a b + c` in float32, rounded once; a multiplication and an addition are not fused by themselves."""
    return a * b + c if interpret else elementwise("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [a, jnp.broadcast_to(b, a.shape), c])


def _float_bits(value: float) -> int:
    return int(np.float32(value).view(np.uint32))
