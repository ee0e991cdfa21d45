"""What a solve gives, how it is judged, and round-to-nearest, against which it is."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jgptq.errors import ConfigError
from jgptq.notation import Float, Int, UInt8
from jgptq.settings.sizes import group_rows
from jgptq.settings.solver import SolverConfig
from jgptq.solver.compensate import Compensated
from jgptq.solver.grid import nearest_codes, search_grid
from jgptq.solver.linalg.cholesky import all_finite
from jgptq.solver.linalg.triangular import product
from jgptq.solver.outcome import Outcome

_PANELS = 8  # of the Hessian in a loss: those below the diagonal mirror those above, and are not multiplied
_LANES = 8


class Solution(NamedTuple):
    """The quantized linear, in file order."""

    codes_kn: UInt8[jax.Array, "K N"]  # unsigned codes
    scale_gn: Float[jax.Array, "G N"]  # float16
    zero_gn: Int[jax.Array, "G N"]  # int32
    group_k: Int[jax.Array, " K"] | None  # int32, the group of each row; None where groups are runs of rows of the file
    loss_n: Float[jax.Array, " N"]  # dW^T H dW of each column, with the undamped H, against the target of the solve
    rtn_loss_n: Float[jax.Array, " N"] | None  # the same for round-to-nearest on the same kind of grid; None if not asked for
    damping: Float[jax.Array, ""]  # fraction of the mean diagonal that was added
    outcome: Int[jax.Array, ""]  # an `Outcome`

    def dequantize(self) -> Float[jax.Array, "K N"]:
        """`scale * (code - zero)`, float32."""
        k, n = self.codes_kn.shape
        codes_kn, scale_gn = self.codes_kn.astype(jnp.int32), self.scale_gn.astype(jnp.float32)
        if self.group_k is not None:
            return (codes_kn - self.zero_gn[self.group_k]).astype(jnp.float32) * scale_gn[self.group_k]
        codes_grn = codes_kn.reshape(scale_gn.shape[0], -1, n)
        return ((codes_grn - self.zero_gn[:, None, :]).astype(jnp.float32) * scale_gn[:, None, :]).reshape(k, n)


@functools.partial(jax.jit, static_argnames="config")
def round_to_nearest(
    w_kn: Float[jax.Array, "K N"], config: SolverConfig, weight_k: Float[jax.Array, " K"] | None = None
) -> Solution:
    """Rounds every weight to the nearest point of its group's grid: the baseline.

    Args:
      w_kn: `[K, N]`; K a multiple of the group size.
      config: bits, group size and grid.
      weight_k: the diagonal of H, for scales that are searched with it; otherwise it needs no Hessian.

    Returns:
      The solution; its losses are NaN, for they cannot be known without a Hessian.

    Raises:
      ConfigError: the search of scales needs the diagonal of a Hessian, and there is none.
    """
    search = config.grid_search
    if search == "hessian" and weight_k is None:
        raise ConfigError("scale 'hessian' needs calibration tokens; give them, or scale 'mse' or 'minmax'")
    rows = group_rows(w_kn.shape[0], config.group_size)
    w_grn = w_kn.reshape(-1, rows, w_kn.shape[1])
    weight_gr = None if weight_k is None else weight_k.reshape(-1, rows)
    grid = search_grid(w_grn, weight_gr, bits=config.bits, sym=config.sym, scale=search)
    unknown_n = jnp.full((w_kn.shape[1],), jnp.nan, jnp.float32)
    solution = Solution(
        codes_kn=nearest_codes(w_grn, grid, config.bits).astype(jnp.uint8).reshape(w_kn.shape),
        scale_gn=grid.scale_n.astype(jnp.float16),
        zero_gn=grid.zero_n.astype(jnp.int32),
        group_k=None,
        loss_n=unknown_n,
        rtn_loss_n=None,
        damping=jnp.float32(0),
        outcome=jnp.int32(Outcome.ROUNDED),
    )
    return diagnose(solution, w_kn)


def output_loss(dw_kn: Float[jax.Array, "K N"], h_kk: Float[jax.Array, "K K"]) -> Float[jax.Array, " N"]:
    """`dW^T H dW` of each column: the mean squared change of its output over the calibration tokens, times two."""
    k = dw_kn.shape[0]
    loss_n = jnp.zeros((dw_kn.shape[1],), dw_kn.dtype)
    bounds = [k * i // _PANELS for i in range(_PANELS + 1)]
    for start, stop in itertools.pairwise(bounds):
        dw_pn = dw_kn[start:stop]
        half_pn = product(0.5 * h_kk[start:stop, start:stop], dw_pn) + product(h_kk[start:stop, stop:], dw_kn[stop:])
        loss_n += summed(dw_pn * half_pn)
    return 2.0 * loss_n


def summed(a_rn: Float[jax.Array, "R N"]) -> Float[jax.Array, " N"]:
    """The sum over rows, as a product: XLA would fuse a sum with a product before it, and a CPU runs that at a fifth of its
    speed."""
    return product(jnp.ones((_LANES, a_rn.shape[0]), a_rn.dtype), a_rn)[0]


def undamped_loss(found: Compensated, added: Float[jax.Array, ""]) -> Float[jax.Array, " N"]:
    """`dW^T H dW` of each column, from `dW^T (H + added I) dW`, which the loop sums up on its way."""
    return jnp.maximum(found.loss_n - added * found.moved_n, 0.0)


def diagnose(solution: Solution, w_kn: jax.Array) -> Solution:
    """Overrides the outcome where the weights or the grid are not finite."""
    outcome = jnp.where(all_finite(solution.scale_gn.astype(jnp.float32)), solution.outcome, Outcome.SCALE_OVERFLOW)
    return solution._replace(outcome=jnp.where(all_finite(w_kn), outcome, Outcome.NONFINITE_WEIGHTS))
