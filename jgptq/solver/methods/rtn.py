"""Round-to-nearest: every weight to the nearest point of its group's grid."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp

from jgptq.notation import Float, Int
from jgptq.settings.solver import Order, SolverConfig
from jgptq.solver.codes.grid import GridSpec, round_groups
from jgptq.solver.codes.problem import Quantized
from jgptq.solver.methods.base import DIAGONAL_ALONE, Statistics
from jgptq.solver.outcome import Outcome
from jgptq.solver.prepared import Prepared


@dataclasses.dataclass(frozen=True, kw_only=True)
class RTN:
    """No loop: no row reads another."""

    spec: GridSpec
    group_size: int  # -1 for all of K
    statistics: Statistics = DIAGONAL_ALONE
    order: Order = "none"
    is_nearest: bool = True

    @classmethod
    def of(cls, config: SolverConfig) -> Self:
        """The method with the settings of a config."""
        spec = GridSpec(bits=config.bits, sym=config.sym, scale=config.grid_search)
        return cls(spec=spec, group_size=config.group_size)

    def quantize(
        self, w_kn: Float[jax.Array, "K N"], residual_kn: Float[jax.Array, "K N"] | None, prepared: Prepared
    ) -> Quantized:
        """`jgptq.solver.methods.base.Method.quantize`."""
        weight_k = prepared.placement.matrix(prepared.h_kk).diagonal()
        codes_kn, grid = round_groups(w_kn, self.spec, self.group_size, weight_k)
        return Quantized(codes_kn, grid.scale_n, grid.zero_n, None, target_kn=w_kn, loss_n=None)

    def outcome(self, prepared: Int[jax.Array, ""]) -> Int[jax.Array, ""]:
        """It needs no factor, so that only a Hessian that is not finite is in its way."""
        return jnp.where(prepared == Outcome.NONFINITE_HESSIAN, prepared, Outcome.ROUNDED)
