"""The integer grid of a group: its scale and zero point, and round-to-nearest on it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jgptq.notation import Float


class Grid(NamedTuple):
    """Points `scale * (code - zero)` for codes 0..2^bits-1, one grid a column."""

    scale_n: Float[jax.Array, "*groups N"]  # float32, each exactly a float16, as files hold it
    zero_n: Float[jax.Array, "*groups N"]  # float32 integers in 0..2^bits-1


def minmax_grid(w_rn: Float[jax.Array, "*groups R N"], bits: int, sym: bool) -> Grid:
    """The smallest grid that covers the rows of a group.

    Symmetric: `scale = 2 max|w| / (2^bits - 1)`, `zero = 2^(bits-1)`. Asymmetric, with lo = min(w, 0) and hi = max(w, 0):
    `scale = (hi - lo) / (2^bits - 1)`, `zero = round(-lo / scale)`. The scale is rounded to float16 first, so that the solver
    works on the grid that the file will hold; a group of zeros gets scale 1.

    Args:
      w_rn: float32 `[..., R, N]`, the rows of one group, or of several along leading axes.
      bits: width of a code.
      sym: whether the grid is symmetric.

    Returns:
      Scales and zero points `[..., N]`.
    """
    max_code = 2**bits - 1
    if sym:
        scale_n = _storable(2.0 * jnp.max(jnp.abs(w_rn), axis=-2) / max_code)
        return Grid(scale_n, jnp.full(scale_n.shape, 2.0 ** (bits - 1), jnp.float32))
    low_n = jnp.minimum(jnp.min(w_rn, axis=-2), 0.0)
    high_n = jnp.maximum(jnp.max(w_rn, axis=-2), 0.0)
    scale_n = _storable((high_n - low_n) / max_code)
    return Grid(scale_n, jnp.clip(jnp.round(-low_n / scale_n), 0, max_code))


def nearest_codes(w_rn: Float[jax.Array, "*groups R N"], grid: Grid, bits: int) -> Float[jax.Array, "*groups R N"]:
    """The code of the nearest grid point of each weight, `clip(round(w / scale) + zero, 0, 2^bits - 1)`, as float32."""
    scale, zero = grid.scale_n[..., None, :], grid.zero_n[..., None, :]
    return jnp.clip(jnp.round(w_rn / scale) + zero, 0, 2**bits - 1)


def _storable(scale_n: Float[jax.Array, "*groups N"]) -> Float[jax.Array, "*groups N"]:
    """Rounds positive scales to float16 (never to zero), and zero scales to one."""
    smallest = float(jnp.finfo(jnp.float16).smallest_subnormal)
    stored = jnp.maximum(scale_n, smallest).astype(jnp.float16).astype(jnp.float32)
    return jnp.where(scale_n > 0, stored, 1.0)
