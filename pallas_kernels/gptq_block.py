"""The inner loop of the solver: plain JAX, or one Pallas kernel that Triton lowers for NVIDIA GPUs.

Output columns are independent, so that a program takes a few of them through all steps: the rows stay in registers, and one
launch does what would be several a step.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as gpu

from pallas_kernels import reference
from pallas_kernels.assembly import elementwise
from pallas_kernels.device import Backend, resolve
from pallas_kernels.reference import BlockResult

COLUMNS = 16
ROWS = (32, 64, 128)
"""Steps that one launch of the kernel can have."""


def gptq_block(
    w_rn: jax.Array,
    u_rr: jax.Array,
    scale_rn: jax.Array,
    zero_rn: jax.Array,
    drift_rr: jax.Array | None = None,
    *,
    bits: int,
    backend: Backend = "auto",
) -> BlockResult:
    """Quantizes R rows in sequence, each compensating the error of those before it (GPTQ, Frantar et al. 2022, algorithm 1).

    For k = 0..R-1: `code_k = clip(round(w_k / scale) + zero)`, `e_k = (w_k - scale * (code_k - zero)) / u[k, k]`, and
    `w_j -= u[k, j] * e_k` for every later row j; with a drift also `w_j += drift[k, j] * w_k` (GPTAQ, arXiv 2504.02692).
    Rounding is half to even and the division a true division on every backend: where sums are exact, codes are the same bit for
    bit. The kernel adds row by row what plain JAX sums in one product, so that a weight within rounding of a tie may differ.

    Args:
      w_rn: float32 `[R, N]`, rows as updated by all rows before this block.
      u_rr: float32 `[R, R]`, the diagonal block of the upper factor U, H^-1 = U^T U.
      scale_rn: float32 `[R, N]`, or `[1, N]` where all rows share a scale.
      zero_rn: float32 of the same shape, integers.
      drift_rr: float32 `[R, R]`, strictly upper; None for plain GPTQ.
      bits: width of a code.
      backend: "triton", "jax", "interpret", or "auto": the kernel on a GPU, for float32 and R of 32, 64 or 128; else plain JAX.

    Returns:
      The codes, and the errors and rows that the caller spreads over the rows after this block.

    Raises:
      ValueError: shapes that do not agree, or a backend that cannot run them.
    """
    rows = w_rn.shape[0]
    _check(w_rn, u_rr, scale_rn, zero_rn, drift_rr)
    fits = rows in ROWS and w_rn.dtype == jnp.float32
    backend = resolve(backend, None if fits else f"takes float32 and {ROWS} rows, found {w_rn.dtype} and {rows}")
    if backend == "jax":
        return reference.gptq_block(w_rn, u_rr, scale_rn, zero_rn, drift_rr, bits=bits)
    return launched(w_rn, u_rr, scale_rn, zero_rn, drift_rr, bits=bits, interpret=backend == "interpret")


def launched(
    w_rn: jax.Array,
    u_rr: jax.Array,
    scale_rn: jax.Array,
    zero_rn: jax.Array,
    drift_rr: jax.Array | None = None,
    *,
    bits: int,
    interpret: bool,
) -> BlockResult:
    """`gptq_block` as the kernel, whatever the device."""
    rows, n = w_rn.shape
    filled = -(-n // COLUMNS) * COLUMNS
    w_rn, zero_rn = (jnp.pad(a, ((0, 0), (0, filled - n))) for a in (w_rn, zero_rn))
    scale_rn = jnp.pad(scale_rn, ((0, 0), (0, filled - n)), constant_values=1.0)
    drifts = drift_rr is not None
    operands = [w_rn, u_rr, scale_rn, zero_rn, *([drift_rr] if drift_rr is not None else [])]
    floats = jax.ShapeDtypeStruct((rows, filled), jnp.float32)
    found = pl.pallas_call(
        functools.partial(_kernel, bits=bits, drifts=drifts, shared=scale_rn.shape[0] == 1, exact=interpret),
        out_shape=[jax.ShapeDtypeStruct((rows, filled), jnp.int8), floats, *([floats] if drifts else [])],
        grid=(filled // COLUMNS,),
        interpret=interpret,
        compiler_params=gpu.CompilerParams(num_warps=4, num_stages=1),
        name="gptq_block",
    )(*operands)
    codes_rn = jax.lax.bitcast_convert_type(found[0], jnp.uint8)
    turn_rn = found[2] if drifts else jnp.zeros((0, filled), jnp.float32)
    return BlockResult(codes_rn[:, :n], found[1][:, :n], turn_rn[:, :n])


def _check(w_rn: jax.Array, u_rr: jax.Array, scale_rn: jax.Array, zero_rn: jax.Array, drift_rr: jax.Array | None) -> None:
    rows, n = w_rn.shape
    wrong = [
        f"{name} must be {' or '.join(map(str, allowed))} for w {[rows, n]}, found {list(part.shape)}"
        for name, part, allowed in (
            ("u", u_rr, ([rows, rows],)),
            ("scale", scale_rn, ([rows, n], [1, n])),
            ("zero", zero_rn, (list(scale_rn.shape),)),
            ("drift", drift_rr, ([rows, rows],)),
        )
        if part is not None and list(part.shape) not in allowed
    ]
    if wrong:
        raise ValueError("; ".join(wrong))


def _kernel(*refs: Any, bits: int, drifts: bool, shared: bool, exact: bool) -> None:
    """All steps for a few columns."""
    w_ref, u_ref, scale_ref, zero_ref, *rest = refs
    drift_ref, code_ref, error_ref, turn_ref = rest if drifts else (None, *rest, None)
    rows = w_ref.shape[0]
    columns = pl.ds(pl.program_id(0) * COLUMNS, COLUMNS)
    every = pl.ds(0, rows)
    index = jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)

    def step(k: jax.Array, w_rn: jax.Array) -> jax.Array:
        w_n = jnp.sum(jnp.where(index == k, w_rn, 0.0), axis=0)
        at = jnp.int32(0) if shared else k
        scale_n, zero_n = gpu.load(scale_ref.at[at, columns]), gpu.load(zero_ref.at[at, columns])
        u_r = gpu.load(u_ref.at[k, every])
        pivot = jnp.broadcast_to(gpu.load(u_ref.at[k, k]), w_n.shape)
        code_n = jnp.clip(_rounded(_quotient(w_n, scale_n, exact), exact) + zero_n, 0.0, 2.0**bits - 1)
        error_n = _quotient(w_n - scale_n * (code_n - zero_n), pivot, exact)
        gpu.store(code_ref.at[k, columns], code_n.astype(jnp.int32).astype(jnp.int8))
        gpu.store(error_ref.at[k, columns], error_n)
        w_rn = w_rn - u_r[:, None] * error_n[None, :]
        if drift_ref is not None:
            gpu.store(turn_ref.at[k, columns], w_n)
            w_rn = w_rn + gpu.load(drift_ref.at[k, every])[:, None] * w_n[None, :]
        return w_rn

    jax.lax.fori_loop(0, rows, step, gpu.load(w_ref.at[every, columns]))


def _quotient(a: jax.Array, b: jax.Array, exact: bool) -> jax.Array:
    """A division that is rounded once: Triton's own is an approximation."""
    return a / b if exact else elementwise("div.rn.f32 $0, $1, $2;", "=f,f,f", [a, b])


def _rounded(a: jax.Array, exact: bool) -> jax.Array:
    """Half to even."""
    return jnp.round(a) if exact else elementwise("cvt.rni.f32.f32 $0, $1;", "=f,f", [a])
