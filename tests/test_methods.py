"""Orders, scales, methods and targets of the solver against the textbook, in double precision so that codes can be equal."""

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jgptq.config import QuantizeConfig
from jgptq.errors import ConfigError
from jgptq.solver import Outcome, Solution, prepare, solve, solve_many
from jgptq.solver import compensate as COMPENSATE
from jgptq.solver.cholesky import diagonal_blocks
from jgptq.solver.grid import search_grid
from jgptq.solver.order import inverse_permutation, row_order
from jgptq.solver.target import shifted_target
from jgptq.solver.triangular import inverse_product, inverse_transposed, lower_factor, upper_factor

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


def assert_solves(found: Solution, expected_kn: np.ndarray, target_kn: np.ndarray, h_kk: np.ndarray) -> None:
    """The same weights, all of them, and the loss that is reported is theirs."""
    np.testing.assert_allclose(found.dequantize(), expected_kn, atol=1e-6)
    loss = oracles.output_loss(target_kn - expected_kn, h_kk)
    with double():
        assert float(found.loss_n.sum()) == pytest.approx(loss, rel=1e-6)


# Orders


def test_static_order_is_obq_in_order_of_importance_on_grids_fixed_in_the_file(problem: Problem):
    rows_k = most_important_first(problem)
    fixed = oracles.static_grids(problem.w_kn, 4, 64, sym=False)
    expected_kn = np.empty((K, N))
    expected_kn[rows_k] = oracles.obq_fixed_order(
        problem.w_kn[rows_k],
        problem.h_kk[np.ix_(rows_k, rows_k)],
        4,
        64,
        False,
        DAMPING,
        fixed=(fixed[0][rows_k], fixed[1][rows_k]),
    )
    found = solved("static", problem)
    assert found.group_k is None
    np.testing.assert_array_equal(found.scale_gn, fixed[0][::64])
    np.testing.assert_array_equal(found.zero_gn, fixed[1][::64])
    assert_solves(found, expected_kn, problem.w_kn, problem.h_kk)


def test_desc_act_is_obq_in_order_of_importance_with_groups_of_that_order(problem: Problem):
    rows_k = most_important_first(problem)
    expected_kn = np.empty((K, N))
    expected_kn[rows_k] = oracles.obq_fixed_order(
        problem.w_kn[rows_k], problem.h_kk[np.ix_(rows_k, rows_k)], 3, 32, True, DAMPING
    )
    found = solved("desc_act", problem)
    np.testing.assert_array_equal(np.asarray(found.group_k)[rows_k], np.arange(K) // 32)
    assert_solves(found, expected_kn, problem.w_kn, problem.h_kk)


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("order", ["none", "group", "static", "desc_act"])
def test_only_desc_act_needs_an_index_of_groups(method: str, order: str):
    used = QuantizeConfig(method=method, order=order, group_size=32)
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    found = jax.eval_shape(lambda w_kn, h_kk: solve(w_kn, h_kk, used), shape((64, 8)), shape((64, 64)))
    assert (found.group_k is not None) == (order == "desc_act" and method == "gptq")


@settings(max_examples=25)
@given(st.lists(st.floats(0, 100, width=32, allow_subnormal=False), min_size=64, max_size=64))
def test_full_orders_sort_all_rows_by_importance_and_can_be_undone(diag: list[float]):
    values = np.asarray(diag, np.float32)
    for order in ("static", "desc_act"):
        rows_k = row_order(order, jnp.asarray(values), 32).rows_k
        assert np.all(np.diff(values[np.asarray(rows_k)]) <= 0)
        np.testing.assert_array_equal(np.asarray(inverse_permutation(rows_k))[np.asarray(rows_k)], np.arange(64))


# Scales

_search = jax.jit(search_grid, static_argnames=("bits", "sym", "scale"))


@pytest.mark.parametrize("scale", ["mse", "hessian"])
@pytest.mark.parametrize(("bits", "sym"), [(2, True), (3, False), (4, True)])
def test_searched_grids_are_the_best_of_their_candidates_and_never_worse_than_minmax(bits: int, sym: bool, scale: str):
    random = np.random.default_rng(1)
    w_grn = random.standard_t(3, size=(2, 32, 12))  # heavy tails, so that a smaller range pays
    weight_gr = random.lognormal(size=(2, 32))
    with double():
        found = _search(jnp.asarray(w_grn), jnp.asarray(weight_gr), bits=bits, sym=sym, scale=scale)
    shrunk = 0
    for group in range(2):
        weight_r = weight_gr[group] if scale == "hessian" else None
        expected = oracles.searched_grid(w_grn[group], bits, sym, weight_r)
        np.testing.assert_array_equal(found.scale_n[group], expected[0])
        np.testing.assert_array_equal(found.zero_n[group], expected[1])
        whole = oracles.minmax_grid(w_grn[group], bits, sym)
        error_n = oracles.grid_error(w_grn[group], expected, bits, weight_r)
        assert np.all(error_n <= oracles.grid_error(w_grn[group], whole, bits, weight_r))
        shrunk += int(np.sum(expected[0] < whole[0]))
    assert shrunk > 12


def test_the_hessian_weighs_the_errors_of_rows_in_the_search_of_scales():
    """A row that no input reaches does not stretch the grid of its group."""
    w_rn = np.linspace(-0.1, 0.1, 32)[:, None]
    w_rn[5] = 0.5
    weight_r = np.ones(32)
    weight_r[5] = 0.0
    with double():
        found = _search(jnp.asarray(w_rn), jnp.asarray(weight_r), bits=4, sym=True, scale="hessian")
    assert float(found.scale_n[0]) < 0.3 * oracles.minmax_grid(w_rn, 4, True)[0][0]


@settings(max_examples=25)
@given(st.floats(1e-9, 1e4), st.integers(0, 2**31), st.booleans(), st.sampled_from(["mse", "hessian"]))
def test_searched_scales_are_exact_float16_and_positive(size: float, seed: int, sym: bool, scale: str):
    random = np.random.default_rng(seed)
    w_rn, weight_r = random.standard_t(2, size=(32, 4)) * size, random.lognormal(size=32)
    w_rn[:, 0] = 0.0
    found = _search(jnp.asarray(w_rn, jnp.float32), jnp.asarray(weight_r, jnp.float32), bits=3, sym=sym, scale=scale)
    kept_n = np.asarray(found.scale_n)
    usable_n = np.abs(w_rn).max(0) * 2 / 7 < 6e4  # beyond it float16 ends, and the solve is refused
    assert np.all(kept_n > 0)
    np.testing.assert_array_equal(kept_n[usable_n], kept_n[usable_n].astype(np.float16).astype(np.float32))
    assert np.all((found.zero_n >= 0) & (found.zero_n < 8))
    assert float(found.scale_n[0]) == 1.0


# Optimal Brain Surgeon, Optimal Brain Quantization


def test_obs_pruning_is_the_constrained_least_squares_minimum(problem: Problem):
    """One weight after the other set to zero, the others moved: what least squares gives without those columns."""
    x_tk, w_kn, pruned = problem.x_tk[:, :64], problem.w_kn[:64], [5, 40, 41, 0]
    inverse_kk = np.linalg.inv(x_tk.T @ x_tk)
    found_kn = w_kn
    for q in pruned:
        found_kn, inverse_kk = oracles.obs_update(found_kn, inverse_kk, q, 0.0), oracles.eliminated(inverse_kk, q)
    kept = [k for k in range(64) if k not in pruned]
    expected_kn = np.zeros_like(w_kn)
    expected_kn[kept] = np.linalg.lstsq(x_tk[:, kept], x_tk @ w_kn, rcond=None)[0]
    np.testing.assert_allclose(found_kn, expected_kn, atol=1e-9)


def test_rows_of_the_inverse_factor_move_later_rows_as_obs_does(problem: Problem):
    h_kk = oracles.damped(problem.h_kk, DAMPING)
    with double():
        u_kk = np.linalg.inv(np.asarray(lower_factor(jnp.asarray(h_kk), jnp.zeros(())))).T
    w_kn, inverse_kk = problem.w_kn, np.linalg.inv(h_kk)
    expected_kn = w_kn
    for row in range(3):
        expected_kn, inverse_kk = (
            oracles.obs_update(expected_kn, inverse_kk, row, 0.0),
            oracles.eliminated(inverse_kk, row),
        )
        w_kn = w_kn - np.outer(u_kk[row], w_kn[row] / u_kk[row, row])
    np.testing.assert_allclose(w_kn[3:], expected_kn[3:], atol=1e-9)


def test_an_order_of_importance_is_about_as_good_as_obq_in_the_greedy_order_of_each_column(problem: Problem):
    """Both beat rounding; the order that all columns share costs little (arXiv 2210.17323, section 3.3)."""
    grids = oracles.static_grids(problem.w_kn, 4, 64, sym=False)
    rounded, greedy = (
        oracles.output_loss(problem.w_kn - points_kn, problem.h_kk)
        for points_kn in (
            oracles.nearest(problem.w_kn, grids, 4),
            oracles.obq_greedy(problem.w_kn, problem.h_kk, 4, grids, DAMPING),
        )
    )
    shared = oracles.output_loss(problem.w_kn - np.asarray(solved("static", problem).dequantize()), problem.h_kk)
    assert greedy < 0.9 * rounded
    assert shared < 0.9 * rounded
    assert shared < 1.2 * greedy


# Targets


@pytest.mark.parametrize(("a", "b"), [(1.0, 0.0), (0.0, 1.0), (0.5, 0.75)])
def test_the_shifted_target_is_the_least_squares_solution(problem: Problem, a: float, b: float):
    with double():
        r_kk = upper_factor(jnp.asarray(oracles.damped(problem.h_kk, DAMPING)), jnp.zeros(()))
        arrays = [jnp.asarray(part) for part in (problem.drift_kk, problem.residual_kn)]
        found_kn = np.asarray(shifted_target(jnp.asarray(problem.w_kn), functools.partial(inverse_product, r_kk), *arrays, a, b))
    assert found_kn.shape == (K, N)
    assert np.linalg.norm(found_kn - problem.w_kn) > 1e-3 * np.linalg.norm(problem.w_kn)
    np.testing.assert_allclose(found_kn, target(problem, a, b, DAMPING), atol=1e-9)


def target(problem: Problem, a: float, b: float, damping: float) -> np.ndarray:
    w_kn, x_tk = problem.w_kn, problem.x_tk
    goal_tn = (x_tk + a * (problem.float_tk - x_tk)) @ w_kn + b * problem.lost_tn
    return np.linalg.lstsq(*oracles.augmented(w_kn, x_tk, goal_tn, damping), rcond=None)[0]


def test_a_target_without_a_shift_is_the_kernel(problem: Problem):
    inverse_times = functools.partial(inverse_product, upper_factor(jnp.asarray(problem.h_kk, jnp.float32), jnp.float32(1)))
    w_kn, drift_kk, residual_kn = (
        jnp.asarray(part, jnp.float32) for part in (problem.w_kn, problem.drift_kk, problem.residual_kn)
    )
    np.testing.assert_array_equal(shifted_target(w_kn, inverse_times, drift_kk, residual_kn, 0.0, 0.0), w_kn)
    np.testing.assert_array_equal(shifted_target(w_kn, inverse_times, None, None, 1.0, 1.0), w_kn)


def test_a_solve_with_drift_and_residual_is_obq_on_the_shifted_target(problem: Problem):
    target_kn = target(problem, 0.75, 0.5, DAMPING)
    expected_kn = oracles.obq_fixed_order(target_kn, problem.h_kk, 4, K, False, DAMPING)
    assert_solves(solved("shifted", problem), expected_kn, target_kn, problem.h_kk)


# Asymmetric methods


def test_gptaq_is_its_loop_one_row_at_a_time(problem: Problem):
    rows_k = most_important_first(problem)
    part = problem.rows(rows_k)
    expected_kn = np.empty((K, N))
    expected_kn[rows_k] = oracles.gptaq(part.w_kn, part.x_tk, part.float_tk, 4, 96, True, DAMPING, alpha=0.75)
    assert_solves(solved("gptaq", problem), expected_kn, target(problem, 0.75, 0.0, DAMPING), problem.h_kk)


def test_qronos_is_least_squares_at_every_step(small: Problem):
    """At least 99% of the codes, all of the first row, and the loss to a thousandth."""
    used, found = config("qronos"), solved("qronos", small)
    rows_k = np.asarray(row_order("group", jnp.asarray(np.diag(small.h_kk), jnp.float32), 32).rows_k)
    part = small.rows(rows_k)
    grids = tuple(np.asarray(a, np.float64)[rows_k // 32] for a in (found.scale_gn, found.zero_gn))
    expected_kn = oracles.qronos(part.w_kn, part.x_tk, part.float_tk, grids, used.bits, used.damping)
    found_kn = np.asarray(found.dequantize())[rows_k]
    np.testing.assert_allclose(found_kn[0], expected_kn[0], atol=1e-6)
    assert np.mean(np.abs(found_kn - expected_kn) < 1e-6) >= 0.99
    goal_tn = part.float_tk @ part.w_kn
    losses = [np.linalg.norm(goal_tn - part.x_tk @ points_kn) ** 2 for points_kn in (found_kn, expected_kn)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("name", ["gptaq", "qronos", "shifted"])
def test_asymmetric_methods_bring_outputs_nearer_to_those_of_the_float_model(problem: Problem, small: Problem, name: str):
    problem = small if name == "qronos" else problem
    goal_tn = problem.float_tk @ problem.w_kn + (0.5 * problem.lost_tn if name == "shifted" else 0.0)
    plain = problem._replace(float_tk=problem.x_tk, lost_tn=np.zeros_like(problem.lost_tn))
    error, without = (
        np.linalg.norm(goal_tn - problem.x_tk @ np.asarray(solved(name, given).dequantize())) for given in (problem, plain)
    )
    assert error < 0.97 * without


@pytest.mark.parametrize("method", ["gptaq", "qronos"])
def test_asymmetric_methods_ask_for_the_drift_that_they_lack(method: str):
    used = QuantizeConfig(method=method, group_size=32)
    with pytest.raises(ValueError, match=rf"method '{method}' needs the drift .* give drift_kk"):
        jax.eval_shape(lambda w_kn, h_kk: solve(w_kn, h_kk, used), jnp.ones((64, 8)), jnp.eye(64))


# The loop


def test_the_solve_does_not_depend_on_the_size_of_its_blocks(problem: Problem, monkeypatch: pytest.MonkeyPatch):
    found = []
    with double():
        l_kk = lower_factor(jnp.asarray(oracles.damped(problem.h_kk, DAMPING)), jnp.zeros(()))
        w_kn, diag_k = jnp.asarray(problem.w_kn), jnp.asarray(np.diag(problem.h_kk))
        l_rows = functools.partial(jax.lax.dynamic_slice_in_dim, l_kk)
        for most, block in ((32, 32), (128, 96)):
            monkeypatch.setattr(COMPENSATE, "_MAX_BLOCK", most)
            assert COMPENSATE.solver_block(K, 32) == block
            run = jax.jit(functools.partial(COMPENSATE.compensate, rows=32, config=config("static")), static_argnums=1)
            found.append(run(w_kn, l_rows, inverse_transposed(diagonal_blocks(l_kk, block)), diag_k))
    for other in found[1:]:
        np.testing.assert_array_equal(other.codes_kn, found[0].codes_kn)
        np.testing.assert_array_equal(other.grid.scale_n, found[0].grid.scale_n)


# Health


@pytest.mark.parametrize("name", list(METHODS))
def test_rows_that_no_input_reaches_are_rounded_and_disturb_no_other(problem: Problem, small: Problem, name: str):
    problem, dead = small if name == "qronos" else problem, [3, 50]
    k = len(problem.w_kn)
    x_tk, float_tk = problem.x_tk.copy(), problem.float_tk.copy()
    x_tk[:, dead] = float_tk[:, dead] = 0.0
    w_kn = problem.w_kn * np.where(np.isin(np.arange(k), dead), 0.5, 1.0)[:, None]  # they do not stretch the range of a grid
    silent = Problem(w_kn, x_tk, float_tk, problem.lost_tn)
    found = solved(name, silent)
    assert Outcome(int(found.outcome)) is Outcome.SOLVED
    assert np.all(np.isfinite(found.loss_n))
    rows = k if METHODS[name]["group_size"] == -1 else METHODS[name]["group_size"]
    group_k = np.arange(k) // rows if found.group_k is None else np.asarray(found.group_k)
    step_kn = np.asarray(found.scale_gn, np.float64)[group_k]
    assert np.all(np.abs(np.asarray(found.dequantize()) - w_kn)[dead] <= 0.51 * step_kn[dead])
    smaller_kn = w_kn.copy()
    smaller_kn[dead] *= 0.9
    again = solved(name, silent._replace(w_kn=smaller_kn))
    others = [row for row in range(k) if row not in dead]
    np.testing.assert_array_equal(np.asarray(again.codes_kn)[others], np.asarray(found.codes_kn)[others])


SINGLE = QuantizeConfig(group_size=32, damping=1e-7, scale="mse")


def test_the_damping_rises_where_tokens_span_too_few_directions():
    random = np.random.default_rng(3)
    x_tk = random.normal(size=(8, 64)) * 30
    w_kn = jnp.asarray(random.normal(size=(64, 8)), jnp.float32)
    found = solve(w_kn, jnp.asarray(2 / 8 * x_tk.T @ x_tk, jnp.float32), SINGLE)
    assert Outcome(int(found.outcome)) is Outcome.RAISED_DAMPING
    assert float(found.damping) > 1e-7
    assert np.all(np.isfinite(found.dequantize()))
    assert float(found.loss_n.sum()) < float(found.rtn_loss_n.sum())


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
def test_matrices_that_are_no_hessians_are_told_from_those_that_are(h_kk: np.ndarray, outcome: Outcome):
    found = solve(jnp.ones((64, 8)), jnp.asarray(h_kk, jnp.float32), SINGLE)
    assert Outcome(int(found.outcome)) is outcome


def test_a_drift_that_is_not_finite_is_no_solution(problem: Problem):
    found = solved("gptaq", problem._replace(float_tk=np.where(np.arange(T)[:, None] == 7, np.nan, problem.float_tk)))
    assert Outcome(int(found.outcome)) is Outcome.NONFINITE_HESSIAN


def test_shapes_that_do_not_agree_are_named():
    with pytest.raises(ValueError, match=r"must be square, found \[64, 32\]"):
        prepare(jnp.ones((64, 32)), SINGLE)
    with pytest.raises(ValueError, match=r"kernel \[32, 8\] and the Hessian \[64, 64\] differ in K"):
        solve(jnp.ones((32, 8)), jnp.eye(64), SINGLE)
    with pytest.raises(ValueError, match=r"drift \[32, 32\] must have the shape of the Hessian \[64, 64\]"):
        solve(jnp.ones((64, 8)), jnp.eye(64), SINGLE, drift_kk=jnp.eye(32))


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
