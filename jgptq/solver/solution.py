"""The result of a solve, its losses, and round-to-nearest, the baseline of the losses."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jgptq.errors import ConfigError
from jgptq.notation import Float, Int, UInt8
from jgptq.settings.solver import SolverConfig
from jgptq.solver.codes.grid import GridSpec, round_groups
from jgptq.solver.linalg.cholesky import all_finite
from jgptq.solver.one_device import WholeMatrix
from jgptq.solver.outcome import Outcome


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

    Example:
      >>> import jax.numpy as jnp
      >>> from jgptq.settings.solver import SolverConfig
      >>> solution = round_to_nearest(jnp.ones((64, 32)), SolverConfig(group_size=32, scale="minmax"))
      >>> solution.codes_kn.shape, solution.scale_gn.shape
      ((64, 32), (2, 32))
    """
    if config.grid_search == "hessian" and weight_k is None:
        raise ConfigError("scale 'hessian' needs calibration tokens; give them, or scale 'mse' or 'minmax'")
    spec = GridSpec(bits=config.bits, sym=config.sym, scale=config.grid_search)
    return _rounded(w_kn, weight_k, spec, config.group_size)


@functools.partial(jax.jit, static_argnames=("spec", "group_size"))
def _rounded(w_kn: jax.Array, weight_k: jax.Array | None, spec: GridSpec, group_size: int) -> Solution:
    codes_kn, grid = round_groups(w_kn, spec, group_size, weight_k)
    solution = Solution(
        codes_kn=codes_kn,
        scale_gn=grid.scale_n.astype(jnp.float16),
        zero_gn=grid.zero_n.astype(jnp.int32),
        group_k=None,
        loss_n=jnp.full((w_kn.shape[1],), jnp.nan, jnp.float32),
        rtn_loss_n=None,
        damping=jnp.float32(0),
        outcome=jnp.int32(Outcome.ROUNDED),
    )
    return diagnose(solution, w_kn)


def output_loss(dw_kn: Float[jax.Array, "K N"], h_kk: Float[jax.Array, "K K"]) -> Float[jax.Array, " N"]:
    """`dW^T H dW` of each column: the mean squared change of its output over the calibration tokens, times two."""
    return WholeMatrix(h_kk).quadratic(dw_kn)


def diagnose(solution: Solution, w_kn: jax.Array) -> Solution:
    """Overrides the outcome where the weights or the grid are not finite."""
    outcome = jnp.where(all_finite(solution.scale_gn.astype(jnp.float32)), solution.outcome, Outcome.SCALE_OVERFLOW)
    return solution._replace(outcome=jnp.where(all_finite(w_kn), outcome, Outcome.NONFINITE_WEIGHTS))
