"""The integer grid of a group: its scale and zero point, how they are chosen, and round-to-nearest on it."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jgptq.notation import Float, UInt8
from jgptq.settings.sizes import group_rows
from jgptq.settings.solver import Scale
from pallas_kernels import Arithmetic
from pallas_kernels.gptq_block.reference import PLAIN

MSE_EXPONENT = 2.4
_COARSE, _FINE = 20, 80  # parts of the covering range
_LEAST = 4  # of the coarse parts


class Grid(NamedTuple):
    """Points `scale * (code - zero)` for codes 0..2^bits-1, one grid a column."""

    scale_n: Float[jax.Array, "*groups N"]  # each exactly a float16, as files hold it
    zero_n: Float[jax.Array, "*groups N"]  # integers in 0..2^bits-1


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridSpec:
    """Which grids a group may have, and how one is chosen."""

    bits: int
    sym: bool
    scale: Scale

    def search(
        self,
        w_rn: Float[jax.Array, "*groups R N"],
        weight_r: Float[jax.Array, "*groups R"] | None,
        arithmetic: Arithmetic = PLAIN,
    ) -> Grid:
        """`search_grid` with these settings: a `pallas_kernels.Search`."""
        return search_grid(w_rn, weight_r, arithmetic, bits=self.bits, sym=self.sym, scale=self.scale)


def minmax_grid(w_rn: Float[jax.Array, "*groups R N"], bits: int, sym: bool) -> Grid:
    """The smallest grid that covers the rows of a group.

    Symmetric: `scale = 2 max|w| / (2^bits - 1)`, `zero = 2^(bits-1)`. Asymmetric, with lo = min(w, 0) and hi = max(w, 0):
    `scale = (hi - lo) / (2^bits - 1)`, `zero = round(-lo / scale)`. The scale is rounded to float16 first, so that the solver
    works on the grid that the file will hold; a group of zeros gets scale 1.

    Args:
      w_rn: `[..., R, N]`, the rows of one group, or of several along leading axes.
      bits: width of a code.
      sym: whether the grid is symmetric.

    Returns:
      Scales and zero points `[..., N]`.
    """
    return _shrunk(*_bounds(w_rn, sym), jnp.ones((), w_rn.dtype), bits, sym, PLAIN)


def search_grid(
    w_rn: Float[jax.Array, "*groups R N"],
    weight_r: Float[jax.Array, "*groups R"] | None,
    arithmetic: Arithmetic = PLAIN,
    *,
    bits: int,
    sym: bool,
    scale: Scale,
) -> Grid:
    """The grid of a group, its range shrunk to where rounding to nearest errs least.

    A range that covers every weight spends points on the outliers. Ranges of p times the covering one are tried, p from 1 to 0.2
    in steps of 1/20 and then the best of them and up to 3/80 more or less, and the error measured is `sum_r |w - q|^2.4` ("mse",
    as in the published implementations) or `sum_r h_r (w - q)^2` ("hessian"), where h is the diagonal of H.

    Args:
      w_rn: `[..., R, N]`, the rows of one group, or of several along leading axes. Rows of zeros change nothing.
      weight_r: `[..., R]`, the diagonal of H at these rows; only "hessian" reads it.
      arithmetic: how to divide and round: kernels trace this function inside of them, as a `pallas_kernels.Search`.
      bits: width of a code.
      sym: whether the grid is symmetric.
      scale: "minmax" (no search), "mse" or "hessian".

    Returns:
      Scales and zero points `[..., N]`.
    """
    low_n, high_n = _bounds(w_rn, sym)
    whole_n = jnp.ones_like(high_n)
    if scale == "minmax":
        return _shrunk(low_n, high_n, whole_n, bits, sym, arithmetic)

    def error(part_n: jax.Array) -> jax.Array:
        grid = _shrunk(low_n, high_n, part_n, bits, sym, arithmetic)
        off_rn = w_rn - grid_points(w_rn, grid, bits, arithmetic)
        if scale == "mse" or weight_r is None:
            return jnp.sum(jnp.abs(off_rn) ** MSE_EXPONENT, axis=-2)
        return jnp.sum(weight_r[..., None] * off_rn * off_rn, axis=-2)

    def better(best: tuple[jax.Array, jax.Array], part_n: jax.Array) -> tuple[jax.Array, jax.Array]:
        least_n, at_n = best
        error_n = error(part_n)
        return jnp.minimum(error_n, least_n), jnp.where(error_n < least_n, part_n, at_n)

    coarse, between = _COARSE - _LEAST + 1, _FINE // _COARSE - 1

    def try_part(step: jax.Array, state: tuple[tuple[jax.Array, jax.Array], jax.Array]) -> tuple[Any, jax.Array]:
        best, middle_n = state
        is_coarse = step < coarse
        middle_n = jnp.where(step == coarse, best[1], middle_n)
        off = step - coarse - between
        off = jnp.where(off < 0, off, off + 1)  # the middle itself has been tried
        count = jnp.where(is_coarse, _COARSE - step, off).astype(w_rn.dtype)
        parts = jnp.where(is_coarse, jnp.asarray(_COARSE, w_rn.dtype), jnp.asarray(_FINE, w_rn.dtype))
        part_n = arithmetic.divide(count * whole_n, arithmetic.divisor(parts * whole_n))
        return better(best, jnp.where(is_coarse, part_n, jnp.minimum(middle_n + part_n, 1.0))), middle_n

    # One loop and not one for each step width: XLA unrolls a short one, and its body is most of what a solve compiles.
    start = (jnp.full_like(high_n, jnp.inf), whole_n), whole_n
    best, _ = jax.lax.fori_loop(0, coarse + 2 * between, try_part, start)
    return _shrunk(low_n, high_n, best[1], bits, sym, arithmetic)


def nearest_codes(
    w_rn: Float[jax.Array, "*groups R N"], grid: Grid, bits: int, arithmetic: Arithmetic = PLAIN
) -> Float[jax.Array, "*groups R N"]:
    """The code of the nearest grid point of each weight, `clip(round(w / scale) + zero, 0, 2^bits - 1)`, as floats."""
    scale, zero = grid.scale_n[..., None, :], grid.zero_n[..., None, :]
    return jnp.clip(arithmetic.round(arithmetic.divide(w_rn, scale)) + zero, 0, 2**bits - 1)


def round_groups(
    w_kn: Float[jax.Array, "K N"], spec: GridSpec, group_size: int, weight_k: Float[jax.Array, " K"] | None
) -> tuple[UInt8[jax.Array, "K N"], Grid]:
    """Round-to-nearest.

    Args:
      w_kn: `[K, N]`; groups are runs of rows.
      spec: which grids, and how they are searched.
      group_size: rows in a group, -1 for all of K.
      weight_k: the diagonal of H; only a search with it reads it.

    Returns:
      Codes, and grids `[G, N]`.
    """
    rows = group_rows(w_kn.shape[0], group_size)
    w_grn = w_kn.reshape(-1, rows, w_kn.shape[1])
    grid = spec.search(w_grn, None if weight_k is None else weight_k.reshape(-1, rows))
    return nearest_codes(w_grn, grid, spec.bits).astype(jnp.uint8).reshape(w_kn.shape), grid


def grid_points(
    w_rn: Float[jax.Array, "*groups R N"], grid: Grid, bits: int, arithmetic: Arithmetic = PLAIN
) -> Float[jax.Array, "*groups R N"]:
    """The nearest grid point of each weight."""
    return grid.scale_n[..., None, :] * (nearest_codes(w_rn, grid, bits, arithmetic) - grid.zero_n[..., None, :])


def storable(scale_n: Float[jax.Array, "*groups N"]) -> Float[jax.Array, "*groups N"]:
    """Rounds positive scales to float16 (never to zero), and zero scales to one."""
    smallest = float(jnp.finfo(jnp.float16).smallest_subnormal)
    stored = jnp.maximum(scale_n, smallest).astype(jnp.float16).astype(scale_n.dtype)
    return jnp.where(scale_n > 0, stored, 1.0)


def _bounds(w_rn: jax.Array, sym: bool) -> tuple[jax.Array, jax.Array]:
    """The ends of the covering range, which always holds zero."""
    if sym:
        high_n = jnp.max(jnp.abs(w_rn), axis=-2)
        return -high_n, high_n
    return jnp.minimum(jnp.min(w_rn, axis=-2), 0.0), jnp.maximum(jnp.max(w_rn, axis=-2), 0.0)


def _shrunk(low_n: jax.Array, high_n: jax.Array, part_n: jax.Array, bits: int, sym: bool, arithmetic: Arithmetic) -> Grid:
    """The grid over `part` of a range."""
    top = 2**bits - 1
    scale_n = storable(arithmetic.divide((high_n - low_n) * part_n, arithmetic.divisor(jnp.full_like(high_n, top))))
    if sym:
        return Grid(scale_n, jnp.full(scale_n.shape, 2.0 ** (bits - 1), scale_n.dtype))
    return Grid(scale_n, jnp.clip(arithmetic.round(arithmetic.divide(-low_n * part_n, scale_n)), 0, top))
