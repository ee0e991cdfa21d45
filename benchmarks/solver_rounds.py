"""What `bench_solver.py` times: random problems, and one solve of them by jgptq and by the published loop in torch."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import peer_torch_loop
import torch

from jgptq.run.tiles import tile_columns
from jgptq.settings.run import QuantizeConfig
from jgptq.solver import Prepared, Solution, judge_columns, prepare, solve_columns

BITS, GROUP = 4, 128
COMPILED = "/jax/core/compile/backend_compile_duration"


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


class Compilations:
    """Counts compilations of this process while it is entered."""

    def __enter__(self) -> "Compilations":
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._saw)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._saw)

    def _saw(self, event: str, _: float, **__: Any) -> None:
        self.count += event == COMPILED


def solve_tiles(
    w_kn: jax.Array, prepared: Prepared, config: QuantizeConfig, solve: Callable[..., Solution] = solve_columns
) -> list[Solution]:
    """All columns on one Hessian, in tiles as the whole job cuts them."""
    n = w_kn.shape[1]
    columns = tile_columns((n,))
    return [solve(w_kn[:, start : start + columns], prepared, config) for start in range(0, n, columns)]


def jgptq_round(problem: Problem, config: QuantizeConfig) -> dict[str, Any]:
    """One solve of ours, its two programs timed apart; and the second with round-to-nearest's loss."""
    h_kk, w_kn = jax.block_until_ready((jnp.asarray(problem.h_kk), jnp.asarray(problem.w_kn)))
    prepared = timed(lambda: prepare(h_kk, config))
    tiles = timed(lambda: solve_tiles(w_kn, prepared.value, config))
    assert all(int(tile.outcome) == 0 for tile in tiles.value), [int(tile.outcome) for tile in tiles.value]
    judged = timed(lambda: solve_tiles(w_kn, prepared.value, config, judge_columns))
    return {
        "seconds": prepared.seconds + tiles.seconds,
        "seconds_with_rtn_loss": prepared.seconds + judged.seconds,
        "prepare": prepared.seconds,
        "solve_columns": tiles.seconds,
        "cpu_seconds": prepared.cpu_seconds + tiles.cpu_seconds,
        "codes_kn": np.concatenate([tile.codes_kn for tile in tiles.value], axis=1),
        "values_kn": np.concatenate([tile.dequantize() for tile in tiles.value], axis=1),
        "loss": sum(total(tile.loss_n) for tile in tiles.value),
        "rtn_loss": sum(total(tile.rtn_loss_n) for tile in judged.value),
    }


def torch_round(problem: Problem) -> dict[str, Any]:
    """One run of the published loop, and of the losses."""
    h_kk, w_nk = torch.from_numpy(problem.h_kk), torch.from_numpy(problem.w_kn).T.contiguous()
    solved = timed(lambda: peer_torch_loop.fasterquant(w_nk, h_kk, bits=BITS, group_size=GROUP))
    both = timed(lambda: peer_torch_loop.losses(w_nk, h_kk, solved.value, bits=BITS))
    return {
        "seconds": solved.seconds,
        "losses": both.seconds,
        "cpu_seconds": solved.cpu_seconds,
        "codes_kn": solved.value.codes(BITS).T.numpy(),
        "values_kn": solved.value.values().T.numpy(),
        "rtn_loss": float(both.value[1].double().sum()),
    }


def total(loss_n: jax.Array) -> float:
    """The sum over columns."""
    return float(np.asarray(loss_n, np.float64).sum())
