"""GPTQ (Frantar et al. 2022, arXiv 2210.17323) on a target that makes up for what earlier layers lost."""

import dataclasses
from typing import Self

import jax

from jgptq.notation import Float, Int
from jgptq.settings.solver import Order, SolverConfig
from jgptq.solver.codes.loop import Loop
from jgptq.solver.codes.problem import Problem, Quantized
from jgptq.solver.codes.target import shifted_target
from jgptq.solver.methods.base import Statistics
from jgptq.solver.prepared import Prepared


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTQ:
    """The loop begins with the shifted target and reads no matrix but L."""

    loop: Loop
    order: Order
    statistics: Statistics
    target_shift: float
    residual_shift: float
    is_nearest: bool = False

    @classmethod
    def of(cls, config: SolverConfig) -> Self:
        """The method with the settings of a config."""
        return cls(
            loop=Loop.of(config),
            order=config.order,
            statistics=Statistics(factor=True, drift=config.target_shift > 0, residual=config.shifts_residual),
            target_shift=config.target_shift,
            residual_shift=config.residual_shift,
        )

    def quantize(
        self, w_kn: Float[jax.Array, "K N"], residual_kn: Float[jax.Array, "K N"] | None, prepared: Prepared
    ) -> Quantized:
        """`jgptq.solver.methods.base.Method.quantize`."""
        problem = Problem.of(prepared)
        target_kn = shifted_target(
            w_kn, problem.inverse_times, problem.drift, residual_kn, self.target_shift, self.residual_shift
        )
        return self.loop.quantize(target_kn[problem.sequence.rows_k], target_kn, problem, measured=True)

    def outcome(self, prepared: Int[jax.Array, ""]) -> Int[jax.Array, ""]:
        """That of the factorization."""
        return prepared
