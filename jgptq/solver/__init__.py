"""Quantization of one linear: arrays in, arrays out."""

from jgptq.solver.one_device import ONE_DEVICE
from jgptq.solver.outcome import Outcome
from jgptq.solver.placement import Means, Placement
from jgptq.solver.prepared import Prepared
from jgptq.solver.solution import Solution, output_loss, round_to_nearest
from jgptq.solver.solve import judge_columns, prepare, solve, solve_columns, solve_many

__all__ = [
    "ONE_DEVICE",
    "Means",
    "Outcome",
    "Placement",
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
