"""The inner loop of the solver: plain JAX, or one Pallas kernel that Triton lowers for NVIDIA GPUs.

Output columns are independent, so that a program takes a few of them through all steps: the rows stay in registers, and one
launch does what would be several a step.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as gpu

from pallas_kernels.assembly import elementwise
from pallas_kernels.device import Backend, resolve
from pallas_kernels.gptq_block import reference
from pallas_kernels.gptq_block.reference import PLAIN, STEP, Arithmetic, BlockResult, Given, Search, Searched

COLUMNS = 16
MOST_ROWS = 128


def gptq_block(
    w_rn: jax.Array,
    u_rr: jax.Array,
    grids: Given | Searched,
    drift_rr: jax.Array | None = None,
    *,
    bits: int,
    backend: Backend = "auto",
) -> BlockResult:
    """Quantizes R rows in sequence, each compensating the error of those before it (GPTQ, Frantar et al. 2022, algorithm 1).

    For k = 0..R-1: `code_k = clip(round(w_k / scale) + zero)`, `e_k = (w_k - scale * (code_k - zero)) / u[k, k]`, and
    `w_j -= u[k, j] * e_k` for every later row j; with a drift also `w_j += drift[k, j] * w_k` (GPTAQ, arXiv 2504.02692). Where
    grids are searched, a group is given its scale and zero point before the first of its rows.
    Rounding is half to even and the division a true division on every backend: where grids are given and sums are exact, codes
    are the same bit for bit. The kernel adds row by row what plain JAX sums in one product, so that a weight within rounding of a
    tie may differ; and so may a searched grid whose error is within rounding of another's.

    Args:
      w_rn: float32 `[R, N]`, rows as updated by all rows before this block. Plain JAX takes any float dtype, here and below.
      u_rr: float32 `[R, R]`, the diagonal block of the upper factor U, H^-1 = U^T U.
      grids: `Given` scales and zero points, float32 `[R, N]` or, where all rows share them, `[1, N]`; or `Searched`, with weights
        float32 `[R]`, the rows of a group, a multiple of 32 that divides R, and the search.
      drift_rr: float32 `[R, R]`, strictly upper; None for plain GPTQ.
      bits: width of a code.
      backend: "triton", "jax", "interpret", or "auto": the kernel on a GPU, for float32 and R up to 128; else plain JAX.

    Returns:
      The codes and their grids, and the errors and rows that the caller spreads over the rows after this block.

    Raises:
      ValueError: shapes that do not agree, or a backend that cannot run them.
    """
    rows = w_rn.shape[0]
    _check(w_rn, u_rr, grids, drift_rr)
    fits = rows <= MOST_ROWS and w_rn.dtype == jnp.float32
    unfit = None if fits else f"takes float32 and up to {MOST_ROWS} rows, found {w_rn.dtype} and {rows}"
    backend = resolve(backend, "has no kernel for this" if backend == "mosaic" else unfit)
    if backend == "jax":
        return reference.gptq_block(w_rn, u_rr, grids, drift_rr, bits=bits)
    return launched(w_rn, u_rr, grids, drift_rr, bits=bits, interpret=backend == "interpret")


class _Operands(NamedTuple):
    """What the kernel reads: arrays, and references to them inside of it."""

    w_rn: Any  # R a power of two, N a multiple of 16
    u_rr: Any
    given: Any  # a `Given`; None where grids are searched
    weight_r: Any  # None where they are given
    drift_rr: Any  # or None


def launched(
    w_rn: jax.Array, u_rr: jax.Array, grids: Given | Searched, drift_rr: jax.Array | None = None, *, bits: int, interpret: bool
) -> BlockResult:
    """`gptq_block` as the kernel, whatever the device."""
    rows, n = w_rn.shape
    operands = _filled(w_rn, u_rr, grids, drift_rr)
    shape = operands.w_rn.shape
    of_rows: Any = jax.ShapeDtypeStruct(shape, jnp.float32)
    searched = None if isinstance(grids, Given) else (grids.rows, grids.search)
    of_groups: Any = None if searched is None else jax.ShapeDtypeStruct((shape[0] // searched[0], shape[1]), jnp.float32)
    codes: Any = jax.ShapeDtypeStruct(shape, jnp.int8)
    turn: Any = None if drift_rr is None else of_rows
    found = pl.pallas_call(
        functools.partial(_kernel, bits=bits, searched=searched, exact=interpret),
        out_shape=BlockResult(codes, of_rows, turn, of_groups, of_groups),
        grid=(shape[1] // COLUMNS,),
        interpret=interpret,
        compiler_params=gpu.CompilerParams(num_warps=4, num_stages=1),
        name="gptq_block",
    )(operands)
    turn_rn = w_rn[:0] if drift_rr is None else found.turn_rn[:rows, :n]
    codes_rn = jax.lax.bitcast_convert_type(found.codes_rn, jnp.uint8)[:rows, :n]
    scale_gn, zero_gn = grids if isinstance(grids, Given) else (a[: rows // grids.rows, :n] for a in found[3:])
    return BlockResult(codes_rn, found.error_rn[:rows, :n], turn_rn, scale_gn, zero_gn)


def _filled(w_rn: jax.Array, u_rr: jax.Array, grids: Given | Searched, drift_rr: jax.Array | None) -> _Operands:
    """Operands of a size that the kernel takes. Rows that fill up come last, so that they change none before them; and zeros
    change no grid."""
    rows, n = w_rn.shape
    more, more_columns = max(STEP, pl.next_power_of_2(rows)) - rows, -n % COLUMNS

    def wide(part: jax.Array, value: float = 0.0) -> jax.Array:
        more_rows = more if part.shape[0] == rows else 0
        return jnp.pad(part, ((0, more_rows), (0, more_columns)), constant_values=value)

    def square(part_rr: jax.Array) -> jax.Array:
        return part_rr if more == 0 else jax.scipy.linalg.block_diag(part_rr, jnp.eye(more, dtype=part_rr.dtype))

    drift_rr = None if drift_rr is None else square(drift_rr)
    if isinstance(grids, Given):
        return _Operands(wide(w_rn), square(u_rr), Given(wide(grids.scale_rn, 1.0), wide(grids.zero_rn)), None, drift_rr)
    return _Operands(wide(w_rn), square(u_rr), None, jnp.pad(grids.weight_r, (0, more)), drift_rr)


def _check(w_rn: jax.Array, u_rr: jax.Array, grids: Given | Searched, drift_rr: jax.Array | None) -> None:
    rows, n = w_rn.shape
    parts: list[tuple[str, jax.Array | None, list[list[int]]]] = [
        ("u", u_rr, [[rows, rows]]),
        ("drift", drift_rr, [[rows, rows]]),
    ]
    if isinstance(grids, Given):
        parts += [("scale", grids.scale_rn, [[rows, n], [1, n]]), ("zero", grids.zero_rn, [list(grids.scale_rn.shape)])]
    else:
        parts += [("weight", grids.weight_r, [[rows]])]
    wrong = [
        f"{name} must be {' or '.join(map(str, allowed))} for w {[rows, n]}, found {list(part.shape)}"
        for name, part, allowed in parts
        if part is not None and list(part.shape) not in allowed
    ]
    if isinstance(grids, Searched) and (grids.rows % STEP or rows % grids.rows):
        wrong.append(f"rows in a group must be a multiple of {STEP} that divides {rows}, found {grids.rows}")
    if wrong:
        raise ValueError("; ".join(wrong))


def _kernel(
    of: _Operands,
    code_ref: Any,
    error_ref: Any,
    turn_ref: Any,
    scale_ref: Any,
    zero_ref: Any,
    *,
    bits: int,
    searched: tuple[int, Search] | None,
    exact: bool,
) -> None:
    """All steps for a few columns."""
    rows = of.w_rn.shape[0]
    columns, every = pl.ds(pl.program_id(0) * COLUMNS, COLUMNS), pl.ds(0, rows)
    index = jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    arithmetic = PLAIN if exact else _SPELLED_OUT

    def given_grid(k: jax.Array) -> tuple[jax.Array, ...]:
        at = jnp.int32(0) if of.given.scale_rn.shape[0] == 1 else k
        return tuple(gpu.load(ref.at[at, columns]) for ref in of.given)

    def step(k: jax.Array, w_rn: jax.Array, grid_of: Callable[[jax.Array], tuple[jax.Array, ...]]) -> jax.Array:
        w_n = jnp.sum(jnp.where(index == k, w_rn, 0.0), axis=0)
        scale_n, zero_n = grid_of(k)
        u_r = gpu.load(of.u_rr.at[k, every])
        pivot = jnp.broadcast_to(gpu.load(of.u_rr.at[k, k]), w_n.shape)
        code_n = jnp.clip(arithmetic.round(arithmetic.divide(w_n, scale_n)) + zero_n, 0.0, 2.0**bits - 1)
        error_n = arithmetic.divide(w_n - scale_n * (code_n - zero_n), pivot)
        gpu.store(code_ref.at[k, columns], code_n.astype(jnp.int32).astype(jnp.int8))
        gpu.store(error_ref.at[k, columns], error_n)
        w_rn = w_rn - u_r[:, None] * error_n[None, :]
        if turn_ref is not None:
            gpu.store(turn_ref.at[k, columns], w_n)
            w_rn = w_rn + gpu.load(of.drift_rr.at[k, every])[:, None] * w_n[None, :]
        return w_rn

    def run_group(g: jax.Array, w_rn: jax.Array, of_group: int, search: Search) -> jax.Array:
        first, last = g * of_group, (g + 1) * of_group
        only_rn = jnp.where((index >= first) & (index < last), w_rn, 0.0)
        grid = search(only_rn, gpu.load(of.weight_r.at[every]), arithmetic)
        for ref, part_n in zip((scale_ref, zero_ref), grid, strict=True):
            gpu.store(ref.at[g, columns], part_n)
        return jax.lax.fori_loop(first, last, functools.partial(step, grid_of=lambda _: grid), w_rn)

    w_rn = gpu.load(of.w_rn.at[every, columns])
    if searched is None:
        jax.lax.fori_loop(0, rows, functools.partial(step, grid_of=given_grid), w_rn)
    else:
        of_group, search = searched
        jax.lax.fori_loop(0, rows // of_group, functools.partial(run_group, of_group=of_group, search=search), w_rn)


def _quotient(a: jax.Array, b: jax.Array) -> jax.Array:
    """A division that is rounded once: Triton's own is an approximation."""
    shape = jnp.broadcast_shapes(jnp.shape(a), jnp.shape(b))
    operands = [jnp.broadcast_to(part, shape).astype(jnp.float32) for part in (a, b)]
    return elementwise("div.rn.f32 $0, $1, $2;", "=f,f,f", operands)


def _rounded(a: jax.Array) -> jax.Array:
    """Half to even."""
    return elementwise("cvt.rni.f32.f32 $0, $1;", "=f,f", [a])


_SPELLED_OUT = Arithmetic(_quotient, _rounded, lambda constant: constant)
