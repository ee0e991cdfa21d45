"""Orders, methods and targets of the solver against the textbook, in double precision so that codes can be equal."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import DAMPING, K, N, Problem, T, assert_solves, config, double, most_important_first, solved

from jgptq.errors import ConfigError
from jgptq.settings.run import QuantizeConfig
from jgptq.solver import judge_columns, prepare, solve
from jgptq.solver.codes import compensate as COMPENSATE
from jgptq.solver.codes.grid import GridSpec
from jgptq.solver.codes.sequence import inverse_permutation, row_sequence
from jgptq.solver.codes.target import shifted_target
from jgptq.solver.linalg.cholesky import diagonal_blocks
from jgptq.solver.linalg.triangular import inverse_product, inverse_transposed, lower_factor, upper_factor
from jgptq.solver.one_device import WholeMatrix

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
    solution = solved("static", problem)
    assert solution.group_k is None
    np.testing.assert_array_equal(solution.scale_gn, fixed[0][::64])
    np.testing.assert_array_equal(solution.zero_gn, fixed[1][::64])
    assert_solves(solution, expected_kn, problem.w_kn, problem.h_kk)


def test_desc_act_is_obq_in_order_of_importance_with_groups_of_that_order(problem: Problem):
    rows_k = most_important_first(problem)
    expected_kn = np.empty((K, N))
    expected_kn[rows_k] = oracles.obq_fixed_order(
        problem.w_kn[rows_k], problem.h_kk[np.ix_(rows_k, rows_k)], 3, 32, True, DAMPING
    )
    solution = solved("desc_act", problem)
    np.testing.assert_array_equal(np.asarray(solution.group_k)[rows_k], np.arange(K) // 32)
    assert_solves(solution, expected_kn, problem.w_kn, problem.h_kk)


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("order", ["none", "group", "static", "desc_act"])
def test_only_desc_act_needs_an_index_of_groups(method: str, order: str):
    used = QuantizeConfig(method=method, order=order, group_size=32)
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    solution = jax.eval_shape(lambda w_kn, h_kk: solve(w_kn, h_kk, used), shape((64, 8)), shape((64, 64)))
    assert (solution.group_k is not None) == (order == "desc_act" and method == "gptq")


@settings(max_examples=25)
@given(st.lists(st.floats(0, 100, width=32, allow_subnormal=False), min_size=64, max_size=64))
def test_full_orders_sort_all_rows_by_importance_and_can_be_undone(diag: list[float]):
    values = np.asarray(diag, np.float32)
    for order in ("static", "desc_act"):
        rows_k = row_sequence(order, jnp.asarray(values), 32).rows_k
        assert np.all(np.diff(values[np.asarray(rows_k)]) <= 0)
        np.testing.assert_array_equal(np.asarray(inverse_permutation(rows_k))[np.asarray(rows_k)], np.arange(64))


# Optimal Brain Surgeon, Optimal Brain Quantization


def test_obs_pruning_is_the_constrained_least_squares_minimum(problem: Problem):
    """One weight after the other set to zero, the others moved: what least squares gives without those columns."""
    x_tk, w_kn, pruned = problem.x_tk[:, :64], problem.w_kn[:64], [5, 40, 41, 0]
    inverse_kk = np.linalg.inv(x_tk.T @ x_tk)
    updated_kn = w_kn
    for q in pruned:
        updated_kn, inverse_kk = oracles.obs_update(updated_kn, inverse_kk, q, 0.0), oracles.eliminated(inverse_kk, q)
    kept = [k for k in range(64) if k not in pruned]
    expected_kn = np.zeros_like(w_kn)
    expected_kn[kept] = np.linalg.lstsq(x_tk[:, kept], x_tk @ w_kn, rcond=None)[0]
    np.testing.assert_allclose(updated_kn, expected_kn, atol=1e-9)


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
        w_kn, drift_kk, residual_kn = (jnp.asarray(part) for part in (problem.w_kn, problem.drift_kk, problem.residual_kn))
        inverse_times = functools.partial(inverse_product, r_kk)
        shifted_kn = np.asarray(shifted_target(w_kn, inverse_times, drift_kk @ w_kn, residual_kn, a, b))
    assert shifted_kn.shape == (K, N)
    assert np.linalg.norm(shifted_kn - problem.w_kn) > 1e-3 * np.linalg.norm(problem.w_kn)
    np.testing.assert_allclose(shifted_kn, target(problem, a, b, DAMPING), atol=1e-9)


def target(problem: Problem, a: float, b: float, damping: float) -> np.ndarray:
    w_kn, x_tk = problem.w_kn, problem.x_tk
    goal_tn = (x_tk + a * (problem.float_tk - x_tk)) @ w_kn + b * problem.lost_tn
    return np.linalg.lstsq(*oracles.augmented(w_kn, x_tk, goal_tn, damping), rcond=None)[0]


def test_a_target_without_a_shift_is_the_kernel(problem: Problem):
    inverse_times = functools.partial(inverse_product, upper_factor(jnp.asarray(problem.h_kk, jnp.float32), jnp.float32(1)))
    w_kn, drift_kk, residual_kn = (
        jnp.asarray(part, jnp.float32) for part in (problem.w_kn, problem.drift_kk, problem.residual_kn)
    )
    np.testing.assert_array_equal(shifted_target(w_kn, inverse_times, drift_kk @ w_kn, residual_kn, 0.0, 0.0), w_kn)
    np.testing.assert_array_equal(shifted_target(w_kn, inverse_times, None, None, 1.0, 1.0), w_kn)


def test_what_the_float_model_gives_stands_in_for_the_drift_of_the_inputs(problem: Problem):
    used = config("shifted")
    given_kn = 2 / T * problem.x_tk.T @ (problem.float_tk @ problem.w_kn)
    residual_kn = problem.residual_kn + used.target_shift / used.residual_shift * given_kn
    with double():
        prepared = prepare(jnp.asarray(problem.h_kk), used, pulled=True)
        solution = judge_columns(jnp.asarray(problem.w_kn), prepared, used, jnp.asarray(residual_kn))
    expected = solved("shifted", problem)
    np.testing.assert_array_equal(solution.codes_kn, expected.codes_kn)
    np.testing.assert_allclose(solution.loss_n, expected.loss_n, rtol=1e-9)


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
    used, solution = config("qronos"), solved("qronos", small)
    rows_k = np.asarray(row_sequence("group", jnp.asarray(np.diag(small.h_kk), jnp.float32), 32).rows_k)
    part = small.rows(rows_k)
    grids = tuple(np.asarray(a, np.float64)[rows_k // 32] for a in (solution.scale_gn, solution.zero_gn))
    expected_kn = oracles.qronos(part.w_kn, part.x_tk, part.float_tk, grids, used.bits, used.damping)
    quantized_kn = np.asarray(solution.dequantize())[rows_k]
    np.testing.assert_allclose(quantized_kn[0], expected_kn[0], atol=1e-6)
    assert np.mean(np.abs(quantized_kn - expected_kn) < 1e-6) >= 0.99
    goal_tn = part.float_tk @ part.w_kn
    losses = [np.linalg.norm(goal_tn - part.x_tk @ points_kn) ** 2 for points_kn in (quantized_kn, expected_kn)]
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
    with pytest.raises(ConfigError, match=rf"method '{method}' needs the drift .* give drift_kk"):
        jax.eval_shape(lambda w_kn, h_kk: solve(w_kn, h_kk, used), jnp.ones((64, 8)), jnp.eye(64))


# The loop


def test_the_solve_does_not_depend_on_the_size_of_its_blocks(problem: Problem, monkeypatch: pytest.MonkeyPatch):
    results = []
    with double():
        l_kk = lower_factor(jnp.asarray(oracles.damped(problem.h_kk, DAMPING)), jnp.zeros(()))
        w_kn, diag_k = jnp.asarray(problem.w_kn), jnp.asarray(np.diag(problem.h_kk))
        spec = GridSpec(bits=4, sym=False, scale="minmax")
        for most, block in ((32, 32), (128, 96)):
            monkeypatch.setattr(COMPENSATE, "MOST_ROWS", most)
            assert COMPENSATE.solver_block(K, 32) == block
            run = jax.jit(functools.partial(COMPENSATE.compensate, factor=WholeMatrix(l_kk), group_size=32, spec=spec))
            results.append(run(w_kn, u_cbb=inverse_transposed(diagonal_blocks(l_kk, block)), weight_k=diag_k))
    for other in results[1:]:
        np.testing.assert_array_equal(other.codes_kn, results[0].codes_kn)
        np.testing.assert_array_equal(other.grid.scale_n, results[0].grid.scale_n)
