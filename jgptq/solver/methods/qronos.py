"""Qronos (arXiv 2505.11695): the loop makes up for what the inputs have drifted, beginning with its first row."""

import dataclasses

import jax
import jax.numpy as jnp

from jgptq.notation import Float
from jgptq.solver.codes.problem import Problem, Quantized
from jgptq.solver.linalg.triangular import product
from jgptq.solver.methods.compensating import Compensating


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qronos(Compensating):
    """The loop begins with the shifted target, moved to where Qronos chooses its first code, and reads no matrix but L."""

    corrects_in_loop = True

    def run_loop(self, w_kn: Float[jax.Array, "K N"], target_kn: Float[jax.Array, "K N"], problem: Problem) -> Quantized:
        """`Compensating.run_loop`."""
        rows_k = problem.sequence.rows_k
        start_kn = target_kn[rows_k]
        if problem.drift is not None:
            drift, first = problem.drift.permuted(problem.after(rows_k, target_kn)), problem.diag_k[rows_k[0]]
            pull_n = self.target_shift * product(drift.rows(0, 1), w_kn[rows_k])[0]
            one_k1 = problem.after(jnp.zeros((w_kn.shape[0], 1), w_kn.dtype).at[0].set(1.0), pull_n)
            start_kn = qronos_start(w_kn[rows_k[0]], start_kn, problem.factor.solve(one_k1), first, pull_n)
        return self.loop.quantize(start_kn, target_kn, problem, measured=False)


def qronos_start(
    w_n: Float[jax.Array, " N"],
    target_kn: Float[jax.Array, "K N"],
    u_k1: Float[jax.Array, "K 1"],
    first: Float[jax.Array, ""],
    pull_n: Float[jax.Array, " N"],
) -> Float[jax.Array, "K N"]:
    """Where Qronos' loop begins (arXiv 2505.11695, algorithm 1 in the form of its theorem on GPTQ-like updates).

    Its first code is chosen with the rows after it still at their float values, `w_0 + <x_0, (X_f - X) w> / <x_0, x_0>`; all rows
    after it then follow by least squares, and from there on it is GPTQ on the shifted target. Moving row 0 of that target there,
    and the others as conditional least squares demands, says the same.

    Args:
      w_n: row 0 of the kernel.
      target_kn: W' of `jgptq.solver.codes.target.shifted_target`.
      u_k1: the first row of U, with `H^-1 = U^T U`, in the sequence of the rows of W'.
      first: the undamped Hessian's first entry, `<x_0, x_0>`.
      pull_n: `<x_0, (X_f - X) w>`, times the fraction that is corrected.

    Returns:
      What `compensate` starts from, in place of W'.
    """
    live = first > 0
    first_n = w_n + jnp.where(live, pull_n / jnp.where(live, first, 1.0), 0.0)
    return target_kn - u_k1 * ((target_kn[0] - first_n) / u_k1[0])[None]
