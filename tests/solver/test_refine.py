"""Coordinate descent and re-fitted grids against the textbook, and the promise that no step raises the loss."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from jgptq.settings.run import QuantizeConfig
from jgptq.solver import solve
from jgptq.solver.codes.grid import Grid
from jgptq.solver.codes.refine import Refined, _sweep, refine, refit_grid
from jgptq.solver.one_device import WholeMatrix

K, N, T = 192, 12, 300
DAMPING = 2.0**-6


@contextlib.contextmanager
def double() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def problem() -> tuple[np.ndarray, np.ndarray]:
    """Weights with heavy tails, and the damped Hessian of correlated inputs."""
    random = np.random.default_rng(0)
    x_tk = random.normal(size=(T, K)) @ (random.normal(size=(K, K)) * random.lognormal(size=K) * 0.1)
    return random.standard_t(4, size=(K, N)) * 0.05, oracles.damped(2 / T * x_tk.T @ x_tk, DAMPING)


def rounded(w_kn: np.ndarray, bits: int, rows: int, sym: bool) -> tuple[np.ndarray, oracles.Grid]:
    """Where refinement starts here: codes rounded to nearest, and the grid of each weight."""
    grids = oracles.static_grids(w_kn, bits, rows, sym)
    return oracles.nearest_codes(w_kn, grids, bits), grids


def loss_n(w_kn: np.ndarray, h_kk: np.ndarray, codes_kn: np.ndarray, scale_gn: np.ndarray, zero_gn: np.ndarray) -> np.ndarray:
    rows = len(codes_kn) // len(scale_gn)
    scale_kn, zero_kn = (np.repeat(np.asarray(part, np.float64), rows, axis=0) for part in (scale_gn, zero_gn))
    off_kn = w_kn - scale_kn * (np.asarray(codes_kn, np.float64) - zero_kn)
    return np.sum(off_kn * (h_kk @ off_kn), axis=0)


@functools.partial(jax.jit, static_argnames=("group_size", "bits", "sym", "sweeps"))
def _refine(codes_kn: jax.Array, grid: Grid, target_kn: jax.Array, h_kk: jax.Array, **settings: object) -> Refined:
    """With any number of rounds in one program."""
    return refine(codes_kn, grid, target_kn, WholeMatrix(h_kk), **settings)  # type: ignore[arg-type]


@functools.partial(jax.jit, static_argnames=("bits", "sym"))
def _refit(codes_rn: jax.Array, grid: Grid, gradient_rn: jax.Array, h_kk: jax.Array, start: int, bits: int, sym: bool) -> Grid:
    return refit_grid(codes_rn, grid, gradient_rn, WholeMatrix(h_kk), start, bits, sym)


@pytest.mark.parametrize(
    ("bits", "sym", "group_size"),
    [(2, True, 32), (2, False, -1), (3, True, -1), (3, False, 64), (4, True, 64), (4, False, 32), (8, True, 32), (8, False, 96)],
)
def test_no_round_raises_the_loss_of_any_column(problem, bits: int, sym: bool, group_size: int):
    w_kn, h_kk = problem
    rows = K if group_size == -1 else group_size
    codes_kn, grids = rounded(w_kn, bits, rows, sym)
    grid = Grid(*(jnp.asarray(part[::rows], jnp.float32) for part in grids))
    arrays = jnp.asarray(codes_kn, jnp.float32), grid, jnp.asarray(w_kn, jnp.float32), jnp.asarray(h_kk, jnp.float32)
    run = functools.partial(_refine, *arrays, group_size=rows, bits=bits, sym=sym, sweeps=2)
    losses = [loss_n(w_kn, h_kk, codes_kn, *grid)]
    for rounds in (1, 2, 3, 6):
        result = run(rounds=rounds)
        losses.append(loss_n(w_kn, h_kk, *result[:1], *result.grid))
        assert np.all(losses[-1] <= losses[-2] * (1 + 1e-5))
        scale_gn = np.asarray(result.grid.scale_n)
        assert np.all(scale_gn > 0)
        np.testing.assert_array_equal(scale_gn, scale_gn.astype(np.float16).astype(np.float32))
        for part in (result.codes_kn, result.grid.zero_n):
            assert set(np.unique(part)) <= set(range(2**bits))
        if sym:
            np.testing.assert_array_equal(result.grid.zero_n, 2 ** (bits - 1))
    assert losses[-1].sum() < 0.8 * losses[0].sum()


def test_refit_alone_keeps_the_codes_and_lowers_the_loss(problem):
    w_kn, h_kk = problem
    codes_kn, grids = rounded(w_kn, 3, 32, False)
    grid = Grid(*(jnp.asarray(part[::32], jnp.float32) for part in grids))
    arrays = jnp.asarray(codes_kn, jnp.float32), grid, jnp.asarray(w_kn, jnp.float32), jnp.asarray(h_kk, jnp.float32)
    result = _refine(*arrays, group_size=32, rounds=1, bits=3, sym=False, sweeps=0)
    np.testing.assert_array_equal(result.codes_kn, codes_kn)
    after, before = loss_n(w_kn, h_kk, codes_kn, *result.grid), loss_n(w_kn, h_kk, codes_kn, *grid)
    assert np.all(after <= before * (1 + 1e-5))
    assert after.sum() < 0.98 * before.sum()


@pytest.mark.parametrize(("bits", "rows"), [(3, 64), (2, 192)])
def test_a_sweep_is_coordinate_descent_one_code_at_a_time(problem, bits: int, rows: int):
    w_kn, h_kk = problem
    codes_kn, grids = rounded(w_kn, bits, rows, False)
    expected_kn = oracles.descended(codes_kn, w_kn, h_kk, grids, bits)
    gradient_kn = h_kk @ (w_kn - grids[0] * (codes_kn - grids[1]))
    with double():
        grid = Grid(*(jnp.asarray(part[::rows]) for part in grids))
        sweep = jax.jit(_sweep, static_argnums=(4, 5))
        swept_kn, left_kn = sweep(jnp.asarray(codes_kn), jnp.asarray(gradient_kn), jnp.asarray(h_kk), grid, bits, 1)
    np.testing.assert_array_equal(swept_kn, expected_kn)
    assert np.mean(expected_kn != codes_kn) > 0.05
    np.testing.assert_allclose(left_kn, h_kk @ (w_kn - grids[0] * (expected_kn - grids[1])), atol=1e-9)


def test_two_sweeps_are_one_after_the_other(problem):
    w_kn, h_kk = problem
    codes_kn, grids = rounded(w_kn, 3, 64, False)
    gradient_kn = h_kk @ (w_kn - grids[0] * (codes_kn - grids[1]))
    with double():
        grid = Grid(*(jnp.asarray(part[::64]) for part in grids))
        sweep = jax.jit(_sweep, static_argnums=(4, 5))
        swept_kn, _ = sweep(jnp.asarray(codes_kn), jnp.asarray(gradient_kn), jnp.asarray(h_kk), grid, 3, 2)
    once_kn = oracles.descended(codes_kn, w_kn, h_kk, grids, 3)
    np.testing.assert_array_equal(swept_kn, oracles.descended(once_kn, w_kn, h_kk, grids, 3))


@pytest.mark.parametrize("rows", [64, 192])
def test_a_round_is_a_sweep_of_each_block_and_then_the_best_grids_one_after_the_other(problem, rows: int):
    """In numpy, with the blocks of 96 or 64 rows that the solver cuts K into; a grid of all rows waits for the last of them."""
    w_kn, h_kk = problem
    codes_kn, grids = rounded(w_kn, 3, rows, False)
    scale_kn, zero_kn = (part.copy() for part in grids)
    expected_kn = codes_kn.copy()
    for start in range(0, K, min(rows, 96)):
        block = slice(start, start + min(rows, 96))
        swept_kn = oracles.descended(expected_kn, w_kn, h_kk, (scale_kn, zero_kn), 3, block)
        expected_kn[block] = swept_kn[block]
        if block.stop % rows == 0:
            group = slice(block.stop - rows, block.stop)
            best = oracles.best_grid(expected_kn, w_kn, h_kk, (scale_kn, zero_kn), group, range(8))
            scale_kn[group], zero_kn[group] = best
    with double():
        arrays = [jnp.asarray(part) for part in (codes_kn, w_kn, h_kk)]
        grid = Grid(*(jnp.asarray(part[::rows]) for part in grids))
        result = _refine(arrays[0], grid, *arrays[1:], group_size=rows, rounds=1, bits=3, sym=False, sweeps=1)
    np.testing.assert_array_equal(result.codes_kn, expected_kn)
    np.testing.assert_array_equal(result.grid.scale_n, scale_kn[::rows])
    np.testing.assert_array_equal(result.grid.zero_n, zero_kn[::rows])


@pytest.mark.parametrize("sym", [True, False])
def test_a_refitted_grid_is_the_best_of_all_zero_points_and_of_its_float16_neighbours(problem, sym: bool):
    w_kn, h_kk = problem
    bits, rows, group = 3, 64, slice(64, 128)
    codes_kn, grids = rounded(w_kn, bits, rows, sym)
    expected = oracles.best_grid(codes_kn, w_kn, h_kk, grids, group, [4] if sym else range(8))
    gradient_kn = h_kk @ (w_kn - grids[0] * (codes_kn - grids[1]))
    with double():
        result = _refit(
            jnp.asarray(codes_kn[group]),
            Grid(*(jnp.asarray(part[64]) for part in grids)),
            jnp.asarray(gradient_kn[group]),
            jnp.asarray(h_kk),
            64,
            bits,
            sym,
        )
        scale_n, zero_n = (np.asarray(part) for part in result)
    np.testing.assert_array_equal(scale_n, expected[0])
    np.testing.assert_array_equal(zero_n, expected[1])
    assert np.any(scale_n != grids[0][64])
    assert sym or np.any(zero_n != grids[1][64])

    def loss(scale_n: np.ndarray, zero_n: np.ndarray) -> np.ndarray:
        scale_gn, zero_gn = (part[::rows].copy() for part in grids)
        scale_gn[1], zero_gn[1] = scale_n, zero_n
        return loss_n(w_kn, h_kk, codes_kn, scale_gn, zero_gn)

    least = loss(scale_n, zero_n)
    assert np.all(least <= loss(grids[0][64], grids[1][64]))
    for towards in (np.float16(0), np.float16(np.inf)):
        assert np.all(least <= loss(np.nextafter(scale_n.astype(np.float16), towards).astype(np.float64), zero_n))


def test_a_grid_that_cannot_be_fitted_stays_as_it_is():
    """Codes that all equal the zero point say nothing of the scale; and where the best would be below zero, there is none."""
    h_rr = jnp.eye(32)
    grid = Grid(jnp.full(2, 0.5), jnp.full(2, 4.0))
    codes_rn = jnp.stack([jnp.full(32, 4.0), jnp.full(32, 6.0)], axis=1)
    target_rn = jnp.stack([jnp.full(32, 1.0), jnp.full(32, -1.0)], axis=1)
    gradient_rn = target_rn - grid.scale_n[None] * (codes_rn - grid.zero_n[None])
    result = _refit(codes_rn, grid, gradient_rn, h_rr, 0, 3, True)
    np.testing.assert_array_equal(result.scale_n, grid.scale_n)
    np.testing.assert_array_equal(result.zero_n, grid.zero_n)


@pytest.mark.parametrize(("order", "changes"), [("static", {"refine": 2}), ("desc_act", {"refit": True})])
def test_a_solve_that_is_refined_loses_less_and_keeps_its_form(problem, order: str, changes: dict):
    w_kn, h_kk = (jnp.asarray(part, jnp.float32) for part in problem)
    base = QuantizeConfig(bits=3, group_size=64, sym=False, order=order, damping=1e-6)
    plain, refined = (solve(w_kn, h_kk, used) for used in (base, dataclasses.replace(base, **changes)))
    off_kn = problem[0] - np.asarray(refined.dequantize(), np.float64)
    np.testing.assert_allclose(refined.loss_n, np.sum(off_kn * (problem[1] @ off_kn), axis=0), rtol=1e-3)
    assert np.all(refined.loss_n <= plain.loss_n * (1 + 1e-4))
    assert float(refined.loss_n.sum()) < 0.99 * float(plain.loss_n.sum())
    assert refined.scale_gn.dtype == jnp.float16
    if order == "desc_act":
        np.testing.assert_array_equal(refined.group_k, plain.group_k)
        np.testing.assert_array_equal(refined.codes_kn, plain.codes_kn)
    else:
        assert refined.group_k is None
