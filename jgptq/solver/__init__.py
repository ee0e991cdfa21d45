"""Quantization of one linear: arrays in, arrays out."""

from jgptq.solver.outcome import Outcome
from jgptq.solver.solution import Solution, output_loss, round_to_nearest
from jgptq.solver.solve import Prepared, judge_columns, prepare, solve, solve_columns, solve_many

__all__ = [
    "Outcome",
    "Prepared",
    "Solution",
    "judge_columns",
    "output_loss",
    "prepare",
    "round_to_nearest",
    "solve",
    "solve_columns",
    "solve_many",
]
