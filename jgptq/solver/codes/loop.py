"""What every method with error compensation does: the loop over rows, then re-fitting and refinement of its result."""

import dataclasses
import functools
from typing import Self

import jax
import jax.numpy as jnp

from jgptq.notation import Float
from jgptq.settings.sizes import group_rows
from jgptq.settings.solver import SolverConfig
from jgptq.solver.codes.compensate import Compensated, compensate
from jgptq.solver.codes.grid import GridSpec
from jgptq.solver.codes.problem import Problem, Quantized
from jgptq.solver.codes.refine import SWEEPS, Refined, refine
from jgptq.solver.codes.sequence import inverse_permutation
from jgptq.solver.placement import RowReader


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """The settings of the loop and of what follows it."""

    spec: GridSpec
    group_size: int  # -1 for all of K
    rounds: int  # of refinement
    sweeps: int  # over the codes in each of them; without any, scales alone are re-fitted

    @classmethod
    def of(cls, config: SolverConfig) -> Self:
        """The settings that a config has for it."""
        rounds, sweeps = (config.refine, SWEEPS) if config.refine else (int(config.refit), 0)
        spec = GridSpec(bits=config.bits, sym=config.sym, scale=config.grid_search)
        return cls(spec=spec, group_size=config.group_size, rounds=rounds, sweeps=sweeps)

    def quantize(
        self,
        start_kn: Float[jax.Array, "K N"],
        target_kn: Float[jax.Array, "K N"],
        problem: Problem,
        *,
        drift: RowReader | None = None,
        measured: bool,
    ) -> Quantized:
        """Runs the loop, and re-fits and refines where the settings ask for it.

        Args:
          start_kn: what the loop begins with, in the solver's sequence.
          target_kn: what codes are held against, in file order.
          problem: what all columns share; its factor is there.
          drift: GPTAQ's matrix transposed, in the solver's sequence; or None.
          measured: whether the errors that the loop adds up are those against the target.
        """
        result = self.compensated(start_kn, problem, drift)
        loss_n = None
        if measured and not self.rounds:
            loss_n = jnp.maximum(result.loss_n - problem.added * result.moved_n, 0.0)
        refined = self._refined(result, target_kn, problem) if self.rounds else result
        sequence = problem.sequence
        places_k, groups_g = sequence.places_k, inverse_permutation(sequence.groups_g)
        group_size = group_rows(start_kn.shape[0], self.group_size)
        return Quantized(
            codes_kn=refined.codes_kn[places_k].astype(jnp.uint8),
            scale_gn=refined.grid.scale_n[groups_g],
            zero_gn=refined.grid.zero_n[groups_g],
            group_k=(places_k // group_size).astype(jnp.int32) if sequence.order == "desc_act" else None,
            target_kn=target_kn,
            loss_n=loss_n,
        )

    def compensated(self, start_kn: Float[jax.Array, "K N"], problem: Problem, drift: RowReader | None = None) -> Compensated:
        """Codes of the loop, on grids that are set on the way or, for static order, beforehand in the groups of the file."""
        k, n = start_kn.shape
        group_size, sequence = group_rows(k, self.group_size), problem.sequence
        weight_k, fixed = problem.diag_k[sequence.rows_k], None
        if sequence.order == "static":
            grouped = start_kn[sequence.places_k].reshape(-1, group_size, n), problem.diag_k.reshape(-1, group_size)
            fixed = self.spec.search(*grouped), sequence.rows_k // group_size
        return compensate(
            start_kn,
            problem.factor,
            problem.u_cbb,
            weight_k,
            group_size=group_size,
            spec=self.spec,
            fixed=fixed,
            drift=drift,
        )

    def _refined(self, result: Compensated, target_kn: jax.Array, problem: Problem) -> Refined:
        """Re-fits and refines, in a sequence whose groups are runs: the solver's own, or the file's for static order."""
        codes_kn = result.codes_kn.astype(target_kn.dtype)
        # The target is that of the damped least squares: without the damping, directions that hardly any token spans would be
        # fitted to those few.
        h = problem.h.damped(problem.added)
        rows_k, places_k = problem.sequence.rows_k, problem.sequence.places_k
        improve = functools.partial(
            refine,
            group_size=group_rows(target_kn.shape[0], self.group_size),
            rounds=self.rounds,
            sweeps=self.sweeps,
            bits=self.spec.bits,
            sym=self.spec.sym,
        )
        if problem.sequence.order != "static":
            return improve(codes_kn, result.grid, target_kn[rows_k], h.permuted(rows_k))
        refined = improve(codes_kn[places_k], result.grid, target_kn, h)
        return refined._replace(codes_kn=refined.codes_kn[rows_k])
