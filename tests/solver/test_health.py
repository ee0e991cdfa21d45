"""What a solve makes of Hessians that are not what they should be, and what it says of them."""

import jax.numpy as jnp
import numpy as np
import pytest
from problems import METHODS, Problem, T, solved

from jgptq.errors import ConfigError
from jgptq.settings.run import QuantizeConfig
from jgptq.solver import Outcome, prepare, solve, solve_many


@pytest.mark.parametrize("name", list(METHODS))
def test_rows_that_no_input_reaches_are_rounded_and_disturb_no_other(problem: Problem, small: Problem, name: str):
    problem, dead = small if name == "qronos" else problem, [3, 50]
    k = len(problem.w_kn)
    x_tk, float_tk = problem.x_tk.copy(), problem.float_tk.copy()
    x_tk[:, dead] = float_tk[:, dead] = 0.0
    w_kn = problem.w_kn * np.where(np.isin(np.arange(k), dead), 0.5, 1.0)[:, None]  # they do not stretch the range of a grid
    silent = Problem(w_kn, x_tk, float_tk, problem.lost_tn)
    solution = solved(name, silent)
    assert Outcome(int(solution.outcome)) is Outcome.SOLVED
    assert np.all(np.isfinite(solution.loss_n))
    rows = k if METHODS[name]["group_size"] == -1 else METHODS[name]["group_size"]
    group_k = np.arange(k) // rows if solution.group_k is None else np.asarray(solution.group_k)
    step_kn = np.asarray(solution.scale_gn, np.float64)[group_k]
    assert np.all(np.abs(np.asarray(solution.dequantize()) - w_kn)[dead] <= 0.51 * step_kn[dead])
    smaller_kn = w_kn.copy()
    smaller_kn[dead] *= 0.9
    again = solved(name, silent._replace(w_kn=smaller_kn))
    others = [row for row in range(k) if row not in dead]
    np.testing.assert_array_equal(np.asarray(again.codes_kn)[others], np.asarray(solution.codes_kn)[others])


SINGLE = QuantizeConfig(group_size=32, damping=1e-7, scale="mse")


def test_the_damping_rises_where_tokens_span_too_few_directions():
    random = np.random.default_rng(3)
    x_tk = random.normal(size=(8, 64)) * 30
    w_kn = jnp.asarray(random.normal(size=(64, 8)), jnp.float32)
    solution = solve(w_kn, jnp.asarray(2 / 8 * x_tk.T @ x_tk, jnp.float32), SINGLE)
    assert Outcome(int(solution.outcome)) is Outcome.RAISED_DAMPING
    assert float(solution.damping) > 1e-7
    assert np.all(np.isfinite(solution.dequantize()))
    assert float(solution.loss_n.sum()) < float(solution.rtn_loss_n.sum())


@pytest.mark.parametrize(
    ("h_kk", "outcome"),
    [
        (np.zeros((64, 64)), Outcome.ZERO_HESSIAN),
        (np.diag(np.r_[np.nan, np.ones(63)]), Outcome.NONFINITE_HESSIAN),
        (np.diag(np.r_[np.inf, np.ones(63)]), Outcome.NONFINITE_HESSIAN),
        (np.diag(np.r_[-1.0, np.ones(63)]), Outcome.NOT_A_HESSIAN),
        (np.eye(64) + np.diag(np.full(63, 0.5), 1), Outcome.NOT_A_HESSIAN),
    ],
)
def test_matrices_that_are_not_hessians_are_diagnosed(h_kk: np.ndarray, outcome: Outcome):
    solution = solve(jnp.ones((64, 8)), jnp.asarray(h_kk, jnp.float32), SINGLE)
    assert Outcome(int(solution.outcome)) is outcome


def test_a_drift_that_is_not_finite_is_no_solution(problem: Problem):
    solution = solved("gptaq", problem._replace(float_tk=np.where(np.arange(T)[:, None] == 7, np.nan, problem.float_tk)))
    assert Outcome(int(solution.outcome)) is Outcome.NONFINITE_HESSIAN


def test_shapes_that_do_not_agree_are_named():
    with pytest.raises(ConfigError, match=r"must be square, found \[64, 32\]"):
        prepare(jnp.ones((64, 32)), SINGLE)
    with pytest.raises(ConfigError, match="expected a kernel of K=64 in-features, as the Hessian has, found K=32"):
        solve(jnp.ones((32, 8)), jnp.eye(64), SINGLE)


def test_double_precision_says_what_switches_it_on():
    with pytest.raises(ConfigError, match=r"float64 needs .*with jax\.enable_x64\(True\)"):
        solve(jnp.ones((64, 8)), jnp.eye(64), QuantizeConfig(group_size=32, float64=True))


def test_many_problems_at_once_are_solved_as_one_by_one():
    random = np.random.default_rng(4)
    x_etk = random.normal(size=(3, 100, 64)) @ random.normal(size=(3, 64, 64))
    h_ekk = jnp.asarray(np.einsum("etk,etj->ekj", x_etk, x_etk) / 50, jnp.float32)
    w_ekn = jnp.asarray(random.normal(size=(3, 64, 8)), jnp.float32)
    many = solve_many(w_ekn, h_ekk, SINGLE)
    for index in range(3):
        one = solve(w_ekn[index], h_ekk[index], SINGLE)
        np.testing.assert_array_equal(many.codes_kn[index], one.codes_kn)
        np.testing.assert_array_equal(many.scale_gn[index], one.scale_gn)
        assert int(many.outcome[index]) == int(one.outcome)
        np.testing.assert_allclose(many.loss_n[index], one.loss_n, rtol=1e-3)
