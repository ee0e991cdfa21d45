"""The problem of `bench_solver.py`: weights, a Hessian, the settings of the published loop, and how a solve is timed."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jgptq.run.tiles import tile_columns
from jgptq.settings.run import QuantizeConfig
from jgptq.solver import Prepared, Solution, solve_columns

BITS, GROUP = 4, 128


class Problem(NamedTuple):
    """A Hessian with uneven, correlated features, and weights of a round."""

    h_kk: np.ndarray
    w_kn: np.ndarray


class Timed(NamedTuple):
    """A result, the seconds that it took, and the seconds of all cores together."""

    value: Any
    seconds: float
    cpu_seconds: float


def plain_config(group: int = GROUP) -> QuantizeConfig:
    """The published problem."""
    return QuantizeConfig(bits=BITS, group_size=group, sym=True, scale="minmax", target_shift=0.0, residual_shift=0.0)


def random_hessian(k: int) -> np.ndarray:
    """`D (A A^T / r + 0.1 I) D`: a few strong common directions, and diagonals that differ by orders of magnitude."""
    random = np.random.default_rng(k)
    directions_kr = random.standard_normal((k, max(32, k // 16)), np.float32)
    h_kk = directions_kr @ directions_kr.T / directions_kr.shape[1]
    h_kk[np.arange(k), np.arange(k)] += 0.1
    spread_k = np.exp(0.5 * random.standard_normal(k, np.float32))
    h_kk *= spread_k[:, None]
    h_kk *= spread_k[None, :]
    return h_kk


def random_weights(k: int, n: int, seed: int) -> np.ndarray:
    """Weights `[K, N]` of the size that a trained linear has."""
    return np.random.default_rng(seed).standard_normal((k, n), np.float32) / np.float32(np.sqrt(k))


def timed(run: Callable[[], Any]) -> Timed:
    """Runs once, to the end of its computation."""
    used, started = time.process_time(), time.perf_counter()
    value = jax.block_until_ready(run())
    return Timed(value, time.perf_counter() - started, time.process_time() - used)


def solve_tiles(
    w_kn: jax.Array, prepared: Prepared, config: QuantizeConfig, solve: Callable[..., Solution] = solve_columns
) -> list[Solution]:
    """All columns on one Hessian, in tiles as the whole job cuts them."""
    n = w_kn.shape[1]
    columns = tile_columns((n,))
    return [solve(w_kn[:, start : start + columns], prepared, config) for start in range(0, n, columns)]
