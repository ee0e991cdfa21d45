"""GPTAQ (arXiv 2504.02692): the loop itself makes up for what the inputs have drifted, row by row."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp

from jgptq.notation import Float, Int
from jgptq.settings.solver import Order, SolverConfig
from jgptq.solver.codes.loop import Loop
from jgptq.solver.codes.problem import Problem, Quantized
from jgptq.solver.codes.target import shifted_target
from jgptq.solver.methods.base import Statistics
from jgptq.solver.placement import Matrix, Triangular
from jgptq.solver.prepared import Prepared


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTAQ:
    """The loop begins with the kernel; besides L it reads P, by which each row moves those after it."""

    loop: Loop
    order: Order
    statistics: Statistics
    target_shift: float
    is_nearest: bool = False

    @classmethod
    def of(cls, config: SolverConfig) -> Self:
        """The method with the settings of a config."""
        shifts = config.target_shift > 0
        return cls(
            loop=Loop.of(config),
            order=config.order,
            statistics=Statistics(factor=True, drift=shifts, residual=config.shifts_residual, needs_drift=shifts),
            target_shift=config.target_shift,
        )

    def quantize(
        self, w_kn: Float[jax.Array, "K N"], residual_kn: Float[jax.Array, "K N"] | None, prepared: Prepared
    ) -> Quantized:
        """`jgptq.solver.methods.base.Method.quantize`."""
        problem = Problem.of(prepared)
        rows_k, moves = problem.sequence.rows_k, None
        target_kn = shifted_target(w_kn, problem.inverse_times, problem.drift, None, self.target_shift)
        if problem.drift is not None:
            moves = transposed_moves(problem.factor, problem.drift.permuted(rows_k), self.target_shift)
        return self.loop.quantize(w_kn[rows_k], target_kn, problem, drift=moves, measured=False)

    def outcome(self, prepared: Int[jax.Array, ""]) -> Int[jax.Array, ""]:
        """That of the factorization."""
        return prepared


def transposed_moves(factor: Triangular, drift: Matrix, alpha: float) -> Matrix:
    """The matrix P of GPTAQ's loop, by which row k moves the rows after it, `w_j += P[k, j] w_k` (arXiv 2504.02692, eq. 18).

    `P = alpha strictly_upper(strictly_upper((X_f - X)^T X U^T) U)`, with `H^-1 = U^T U`, that is `U = L^-T`.

    Args:
      factor: L.
      drift: C = 2/T X^T (X_f - X), rows and columns as in L.
      alpha: the fraction that is corrected.

    Returns:
      P transposed, strictly lower.
    """
    drift_kc, columns_c = drift.own_columns()
    below_kc = jnp.arange(drift.k)[:, None] > columns_c[None, :]
    solved_kc = jnp.where(below_kc, factor.transposed_solve(drift_kc), 0.0)
    return drift.with_columns(alpha * jnp.where(below_kc, factor.solve(solved_kc), 0.0))
