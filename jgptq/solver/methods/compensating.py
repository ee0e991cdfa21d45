"""What the methods with error compensation share: one target, and one loop that ends at its codes."""

import abc
import dataclasses
from typing import ClassVar, Self

import jax

from jgptq.notation import Float, Int
from jgptq.settings.solver import Order, SolverConfig
from jgptq.solver.codes.loop import Loop
from jgptq.solver.codes.problem import Problem, Quantized
from jgptq.solver.codes.target import shifted_target
from jgptq.solver.methods.base import Statistics
from jgptq.solver.prepared import Prepared


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compensating(abc.ABC):
    """`jgptq.solver.methods.base.Method` for a method that spreads the error of each row over the rows after it. A subclass says
    in `run_loop` where the loop begins, and which matrix its rows read besides L."""

    corrects_in_loop: ClassVar[bool]  # whether the loop itself corrects the drift of the inputs, so that there must be one
    loop: Loop
    order: Order
    statistics: Statistics
    target_shift: float
    residual_shift: float
    is_nearest: bool = False

    @classmethod
    def of(cls, config: SolverConfig) -> Self:
        """The method with the settings of a config."""
        shifts = config.target_shift > 0
        return cls(
            loop=Loop.of(config),
            order=config.order,
            statistics=Statistics(
                factor=True,
                drift=shifts,
                residual=config.residual_shift > 0 and not cls.corrects_in_loop,
                needs_drift=shifts and cls.corrects_in_loop,
            ),
            target_shift=config.target_shift,
            residual_shift=config.residual_shift,
        )

    def quantize(
        self, w_kn: Float[jax.Array, "K N"], residual_kn: Float[jax.Array, "K N"] | None, prepared: Prepared
    ) -> Quantized:
        """`jgptq.solver.methods.base.Method.quantize`."""
        problem = Problem.of(prepared)
        w_kn = prepared.placement.after(w_kn, problem.diag_k)
        drift_kn = problem.drift_times(w_kn) if self.target_shift else None
        target_kn = shifted_target(w_kn, problem.inverse_times, drift_kn, residual_kn, self.target_shift, self.residual_shift)
        return self.run_loop(w_kn, target_kn, problem)

    @abc.abstractmethod
    def run_loop(self, w_kn: Float[jax.Array, "K N"], target_kn: Float[jax.Array, "K N"], problem: Problem) -> Quantized:
        """Codes and grids.

        Args:
          w_kn: the kernel, in file order.
          target_kn: W' of `jgptq.solver.codes.target.shifted_target`, in file order.
          problem: what all columns share.
        """

    def outcome(self, prepared: Int[jax.Array, ""]) -> Int[jax.Array, ""]:
        """That of the factorization."""
        return prepared
