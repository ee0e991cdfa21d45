"""GPTQ (Frantar et al. 2022, arXiv 2210.17323) on a target that makes up for what earlier layers lost."""

import dataclasses

import jax

from jgptq.notation import Float
from jgptq.solver.codes.problem import Problem, Quantized
from jgptq.solver.methods.compensating import Compensating


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTQ(Compensating):
    """The loop begins with the shifted target and reads no matrix but L."""

    corrects_in_loop = False

    def run_loop(self, w_kn: Float[jax.Array, "K N"], target_kn: Float[jax.Array, "K N"], problem: Problem) -> Quantized:
        """`Compensating.run_loop`."""
        return self.loop.quantize(target_kn[problem.sequence.rows_k], target_kn, problem, measured=True)
