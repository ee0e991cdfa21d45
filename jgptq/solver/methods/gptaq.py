"""GPTAQ (arXiv 2504.02692): the loop itself makes up for what the inputs have drifted, row by row."""

import dataclasses

import jax
import jax.numpy as jnp

from jgptq.notation import Float
from jgptq.solver.codes.problem import Problem, Quantized
from jgptq.solver.methods.compensating import Compensating
from jgptq.solver.placement import Matrix, Triangular


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTAQ(Compensating):
    """The loop begins with the kernel; besides L it reads P, by which each row moves those after it."""

    corrects_in_loop = True

    def run_loop(self, w_kn: Float[jax.Array, "K N"], target_kn: Float[jax.Array, "K N"], problem: Problem) -> Quantized:
        """`Compensating.run_loop`."""
        rows_k, moves = problem.sequence.rows_k, None
        if problem.drift is not None:
            drift = problem.drift.permuted(problem.after(rows_k, target_kn))
            moves = transposed_moves(problem.factor, drift, self.target_shift)
        return self.loop.quantize(w_kn[rows_k], target_kn, problem, drift=moves, measured=False)


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
