"""The solver's inner loop as one Pallas kernel that Triton lowers for NVIDIA GPUs.

Output columns are independent: a program takes a few of them through all steps. The rows stay in registers, and one launch does
what would be several a step.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as gpu

from pallas_kernels.assembly import elementwise
from pallas_kernels.gptq_block.operands import Arithmetic, BlockResult, Given, Search, Searched
from pallas_kernels.gptq_block.reference import PLAIN, STEP

BLOCK_N = 16
"""Columns in a program."""


class _Operands(NamedTuple):
    """What the kernel reads: arrays, and inside the kernel references to them."""

    w_rn: Any  # R a power of two, N a multiple of 16
    u_rr: Any
    given: Any  # a `Given`, or None
    weight_r: Any  # of a `Searched`, or None
    drift_rr: Any  # or None


def launch(
    w_rn: jax.Array, u_rr: jax.Array, grids: Given | Searched, drift_rr: jax.Array | None = None, *, bits: int, interpret: bool
) -> BlockResult:
    """`gptq_block` as the kernel, without checks: on a GPU, or in Pallas' interpreter."""
    rows, n = w_rn.shape
    operands = _padded(w_rn, u_rr, grids, drift_rr)
    padded_rows, padded_n = operands.w_rn.shape
    of_rows: Any = jax.ShapeDtypeStruct((padded_rows, padded_n), jnp.float32)
    codes: Any = jax.ShapeDtypeStruct((padded_rows, padded_n), jnp.int8)
    updated: Any = None if drift_rr is None else of_rows
    searched: tuple[int, Search] | None = None
    of_groups: Any = None
    if isinstance(grids, Searched):
        searched = grids.group_size, grids.search
        of_groups = jax.ShapeDtypeStruct((padded_rows // grids.group_size, padded_n), jnp.float32)
    padded = pl.pallas_call(
        functools.partial(_kernel, bits=bits, searched=searched, arithmetic=PLAIN if interpret else EXACT),
        out_shape=BlockResult(codes, of_rows, updated, of_groups, of_groups),
        grid=(padded_n // BLOCK_N,),
        interpret=interpret,
        compiler_params=gpu.CompilerParams(num_warps=4, num_stages=1),
        name="gptq_block",
    )(operands)
    codes_rn = jax.lax.bitcast_convert_type(padded.codes_rn, jnp.uint8)[:rows, :n]
    updated_rn = w_rn[:0] if drift_rr is None else padded.updated_rn[:rows, :n]
    if isinstance(grids, Given):
        scale_gn, zero_gn = grids
    else:
        scale_gn, zero_gn = (part[: rows // grids.group_size, :n] for part in (padded.scale_gn, padded.zero_gn))
    return BlockResult(codes_rn, padded.error_rn[:rows, :n], updated_rn, scale_gn, zero_gn)


def _padded(w_rn: jax.Array, u_rr: jax.Array, grids: Given | Searched, drift_rr: jax.Array | None) -> _Operands:
    """Operands of sizes that the kernel takes. Padding rows come last and so change no row before them; they are zeros, which
    change no searched grid."""
    rows, n = w_rn.shape
    more_rows, more_columns = max(STEP, pl.next_power_of_2(rows)) - rows, -n % BLOCK_N

    def wide(part: jax.Array, value: float = 0.0) -> jax.Array:
        below = more_rows if part.shape[0] == rows else 0
        return jnp.pad(part, ((0, below), (0, more_columns)), constant_values=value)

    def square(part_rr: jax.Array) -> jax.Array:
        return part_rr if more_rows == 0 else jax.scipy.linalg.block_diag(part_rr, jnp.eye(more_rows, dtype=part_rr.dtype))

    drift_rr = None if drift_rr is None else square(drift_rr)
    if isinstance(grids, Given):
        return _Operands(wide(w_rn), square(u_rr), Given(wide(grids.scale_rn, 1.0), wide(grids.zero_rn)), None, drift_rr)
    return _Operands(wide(w_rn), square(u_rr), None, jnp.pad(grids.weight_r, (0, more_rows)), drift_rr)


def _kernel(
    operands: _Operands,
    code_ref: Any,
    error_ref: Any,
    updated_ref: Any,
    scale_ref: Any,
    zero_ref: Any,
    *,
    bits: int,
    searched: tuple[int, Search] | None,
    arithmetic: Arithmetic,
) -> None:
    """All steps for the columns of one program."""
    rows = operands.w_rn.shape[0]
    columns, every = pl.ds(pl.program_id(0) * BLOCK_N, BLOCK_N), pl.ds(0, rows)
    index = jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)

    def given_grid(k: jax.Array) -> tuple[jax.Array, ...]:
        at = jnp.int32(0) if operands.given.scale_rn.shape[0] == 1 else k
        return tuple(gpu.load(ref.at[at, columns]) for ref in operands.given)

    def step(k: jax.Array, w_rn: jax.Array, grid_of: Callable[[jax.Array], tuple[jax.Array, ...]]) -> jax.Array:
        w_n = jnp.sum(jnp.where(index == k, w_rn, 0.0), axis=0)
        scale_n, zero_n = grid_of(k)
        u_r = gpu.load(operands.u_rr.at[k, every])
        pivot = jnp.broadcast_to(gpu.load(operands.u_rr.at[k, k]), w_n.shape)
        code_n = jnp.clip(arithmetic.round(arithmetic.divide(w_n, scale_n)) + zero_n, 0.0, 2.0**bits - 1)
        error_n = arithmetic.divide(w_n - scale_n * (code_n - zero_n), pivot)
        gpu.store(code_ref.at[k, columns], code_n.astype(jnp.int32).astype(jnp.int8))
        gpu.store(error_ref.at[k, columns], error_n)
        w_rn = w_rn - u_r[:, None] * error_n[None, :]
        if updated_ref is not None:
            gpu.store(updated_ref.at[k, columns], w_n)
            w_rn = w_rn + gpu.load(operands.drift_rr.at[k, every])[:, None] * w_n[None, :]
        return w_rn

    def run_group(g: jax.Array, w_rn: jax.Array, group_size: int, search: Search) -> jax.Array:
        first, last = g * group_size, (g + 1) * group_size
        only_rn = jnp.where((index >= first) & (index < last), w_rn, 0.0)
        grid = search(only_rn, gpu.load(operands.weight_r.at[every]), arithmetic)
        for ref, part_n in zip((scale_ref, zero_ref), grid, strict=True):
            gpu.store(ref.at[g, columns], part_n)
        return jax.lax.fori_loop(first, last, functools.partial(step, grid_of=lambda _: grid), w_rn)

    w_rn = gpu.load(operands.w_rn.at[every, columns])
    if searched is None:
        jax.lax.fori_loop(0, rows, functools.partial(step, grid_of=given_grid), w_rn)
    else:
        group_size, search = searched
        jax.lax.fori_loop(0, rows // group_size, functools.partial(run_group, group_size=group_size, search=search), w_rn)


def _quotient(a: jax.Array, b: jax.Array) -> jax.Array:
    """The correctly rounded quotient; Triton's own division is an approximation."""
    shape = jnp.broadcast_shapes(jnp.shape(a), jnp.shape(b))
    operands = [jnp.broadcast_to(part, shape).astype(jnp.float32) for part in (a, b)]
    return elementwise("div.rn.f32 $0, $1, $2;", "=f,f,f", operands)


def _rounded(a: jax.Array) -> jax.Array:
    """The nearest integer, half to even."""
    return elementwise("cvt.rni.f32.f32 $0, $1;", "=f,f", [a])


EXACT = Arithmetic(_quotient, _rounded, lambda constant: constant)
"""What `reference.PLAIN` is for plain JAX, in a Triton kernel."""
