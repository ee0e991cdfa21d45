"""The solver's inner loop: plain JAX, or one Triton kernel on an NVIDIA GPU."""

import jax
import jax.numpy as jnp

from pallas_kernels.backends import Backend, resolve
from pallas_kernels.gptq_block import reference
from pallas_kernels.gptq_block.operands import BlockResult, Given, Searched
from pallas_kernels.gptq_block.reference import STEP

MOST_ROWS = 128
"""Rows of a block that the kernel takes at most; plain JAX takes any."""


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
    grids are searched, a group's scale and zero point are set before its first row.

    Rounding is half to even and the division a true division on every backend: where grids are given and sums are exact, codes
    are the same bit for bit. The kernel adds row by row what plain JAX sums in one product, so a weight within rounding of a tie
    may get the neighbouring code, and a search may choose the other of two grids whose errors differ by rounding alone.

    Args:
      w_rn: float32 `[R, N]`, rows as updated by all rows before this block. Plain JAX takes any float dtype, here and below.
      u_rr: float32 `[R, R]`, the diagonal block of the upper factor U, H^-1 = U^T U.
      grids: `Given` scales and zero points, float32 `[R, N]` or, where all rows share them, `[1, N]`; or `Searched`, with weights
        float32 `[R]`, a group size that is a multiple of 32 and divides R, and the search.
      drift_rr: float32 `[R, R]`, strictly upper; None for plain GPTQ.
      bits: width of a code.
      backend: "triton", "jax", "interpret", or "auto": the kernel on a GPU, for float32 and R up to 128; else plain JAX.

    Returns:
      The codes and their grids, and the errors and updated rows that the caller spreads over the rows after this block.

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
    from pallas_kernels.gptq_block import triton  # Pallas takes half a second to import

    return triton.launch(w_rn, u_rr, grids, drift_rr, bits=bits, interpret=backend == "interpret")


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
    if isinstance(grids, Searched) and (grids.group_size % STEP or rows % grids.group_size):
        wrong.append(f"group_size must be a multiple of {STEP} that divides R = {rows}, found {grids.group_size}")
    if wrong:
        raise ValueError("; ".join(wrong))
