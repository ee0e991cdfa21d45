"""The search of scales: never worse than min-max, and what a float16 holds."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import double

from jgptq.solver.codes.grid import search_grid

_search = jax.jit(search_grid, static_argnames=("bits", "sym", "scale"))


@pytest.mark.parametrize("scale", ["mse", "hessian"])
@pytest.mark.parametrize(("bits", "sym"), [(2, True), (3, False), (4, True)])
def test_searched_grids_are_the_best_of_their_candidates_and_never_worse_than_minmax(bits: int, sym: bool, scale: str):
    random = np.random.default_rng(1)
    w_grn = random.standard_t(3, size=(2, 32, 100))  # heavy tails, so that a smaller range pays; each candidate wins somewhere
    weight_gr = random.lognormal(size=(2, 32))
    with double():
        result = _search(jnp.asarray(w_grn), jnp.asarray(weight_gr), bits=bits, sym=sym, scale=scale)
    shrunk = 0
    for group in range(2):
        weight_r = weight_gr[group] if scale == "hessian" else None
        expected = oracles.searched_grid(w_grn[group], bits, sym, weight_r)
        np.testing.assert_array_equal(result.scale_n[group], expected[0])
        np.testing.assert_array_equal(result.zero_n[group], expected[1])
        whole = oracles.minmax_grid(w_grn[group], bits, sym)
        error_n = oracles.grid_error(w_grn[group], expected, bits, weight_r)
        assert np.all(error_n <= oracles.grid_error(w_grn[group], whole, bits, weight_r))
        shrunk += int(np.sum(expected[0] < whole[0]))
    assert shrunk > 100


def test_scales_are_divided_and_not_multiplied_by_a_reciprocal():
    """A compiler that knows the divisor would do so; a kernel does not."""
    w_rn = np.random.default_rng(0).standard_normal((32, 20_000)).astype(np.float32)
    result = _search(jnp.asarray(w_rn), None, bits=4, sym=True, scale="minmax")
    high_n = np.abs(w_rn).max(0)
    np.testing.assert_array_equal(result.scale_n, ((high_n + high_n) / np.float32(15)).astype(np.float16).astype(np.float32))


def test_the_hessian_weighs_the_errors_of_rows_in_the_search_of_scales():
    """A row that no input reaches does not stretch the grid of its group."""
    w_rn = np.linspace(-0.1, 0.1, 32)[:, None]
    w_rn[5] = 0.5
    weight_r = np.ones(32)
    weight_r[5] = 0.0
    with double():
        result = _search(jnp.asarray(w_rn), jnp.asarray(weight_r), bits=4, sym=True, scale="hessian")
    assert float(result.scale_n[0]) < 0.3 * oracles.minmax_grid(w_rn, 4, True)[0][0]


@settings(max_examples=25)
@given(st.floats(1e-9, 1e4), st.integers(0, 2**31), st.booleans(), st.sampled_from(["mse", "hessian"]))
def test_searched_scales_are_exact_float16_and_positive(size: float, seed: int, sym: bool, scale: str):
    random = np.random.default_rng(seed)
    w_rn, weight_r = random.standard_t(2, size=(32, 4)) * size, random.lognormal(size=32)
    w_rn[:, 0] = 0.0
    result = _search(jnp.asarray(w_rn, jnp.float32), jnp.asarray(weight_r, jnp.float32), bits=3, sym=sym, scale=scale)
    kept_n = np.asarray(result.scale_n)
    usable_n = np.abs(w_rn).max(0) * 2 / 7 < 6e4  # beyond it float16 ends, and the solve is refused
    assert np.all(kept_n > 0)
    np.testing.assert_array_equal(kept_n[usable_n], kept_n[usable_n].astype(np.float16).astype(np.float32))
    assert np.all((result.zero_n >= 0) & (result.zero_n < 8))
    assert float(result.scale_n[0]) == 1.0
