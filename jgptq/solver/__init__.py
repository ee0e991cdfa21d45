"""Quantization of one linear: arrays in, arrays out."""

from jgptq.solver.solve import Outcome, Solution, output_loss, round_to_nearest, solve

__all__ = ["Outcome", "Solution", "output_loss", "round_to_nearest", "solve"]
