"""A linear with correlated inputs, the float model's inputs, and its solutions by every method in double precision."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from jgptq.settings.run import QuantizeConfig
from jgptq.solver import Solution, solve

K, N, T, WIDTH = 192, 16, 400, 16
DAMPING = 2.0**-6


class Problem(NamedTuple):
    w_kn: np.ndarray
    x_tk: np.ndarray  # what the linear reads
    float_tk: np.ndarray  # what it reads in the float model
    lost_tn: np.ndarray  # what the residual stream lost before its output is added

    @property
    def h_kk(self) -> np.ndarray:
        return 2 / T * self.x_tk.T @ self.x_tk

    @property
    def drift_kk(self) -> np.ndarray:
        return 2 / T * self.x_tk.T @ (self.float_tk - self.x_tk)

    @property
    def residual_kn(self) -> np.ndarray:
        return 2 / T * self.x_tk.T @ self.lost_tn

    def rows(self, rows_k: np.ndarray) -> "Problem":
        """Some rows of K, or all in another order."""
        return self._replace(w_kn=self.w_kn[rows_k], x_tk=self.x_tk[:, rows_k], float_tk=self.float_tk[:, rows_k])


@pytest.fixture(scope="module")
def problem() -> Problem:
    """Correlated inputs with a few strong features, and float ones that a part of them is not in."""
    random = np.random.default_rng(0)
    x_tk = random.normal(size=(T, K)) @ (random.normal(size=(K, K)) * random.lognormal(size=K) * 0.1)
    off_tk = random.normal(size=(T, K)) @ random.normal(size=(K, K)) * 0.02 - 0.05 * x_tk
    return Problem(random.normal(size=(K, N)) * 0.05, x_tk, x_tk + off_tk, random.normal(size=(T, N)) * 0.1)


@pytest.fixture(scope="module")
def small(problem: Problem) -> Problem:
    """Fewer features, all of which lost a part of the most important one."""
    few = problem.rows(np.arange(64))
    strongest_t = few.x_tk[:, np.argmax(np.diag(few.h_kk))]
    return few._replace(float_tk=few.float_tk + np.outer(strongest_t, np.random.default_rng(5).normal(size=64) * 0.3))


@contextlib.contextmanager
def double() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


METHODS = {
    "static": {"order": "static", "sym": False, "group_size": 64},
    "desc_act": {"order": "desc_act", "bits": 3, "group_size": 32},
    "gptaq": {"method": "gptaq", "order": "desc_act", "group_size": 96, "target_shift": 0.75},
    "qronos": {"method": "qronos", "order": "group", "bits": 3, "group_size": 32},
    "shifted": {"order": "none", "group_size": -1, "sym": False, "target_shift": 0.75, "residual_shift": 0.5},
}


def config(name: str) -> QuantizeConfig:
    return QuantizeConfig(**{"damping": DAMPING, "scale": "minmax", "float64": True} | METHODS[name])


def solved(name: str, problem: Problem) -> Solution:
    drift_kk = problem.drift_kk if name in ("gptaq", "qronos", "shifted") else None
    residual_kn = problem.residual_kn if name == "shifted" else None
    with double():
        arrays = [None if a is None else jnp.asarray(a) for a in (problem.w_kn, problem.h_kk, drift_kk, residual_kn)]
        return solve(*arrays[:2], config(name), drift_kk=arrays[2], residual_kn=arrays[3])


def most_important_first(problem: Problem) -> np.ndarray:
    return np.argsort(-np.diag(problem.h_kk), kind="stable")


def assert_solves(solution: Solution, expected_kn: np.ndarray, target_kn: np.ndarray, h_kk: np.ndarray) -> None:
    """The same weights, all of them, and the loss that is reported is theirs."""
    np.testing.assert_allclose(solution.dequantize(), expected_kn, atol=1e-6)
    loss = oracles.output_loss(target_kn - expected_kn, h_kk)
    with double():
        assert float(solution.loss_n.sum()) == pytest.approx(loss, rel=1e-6)
