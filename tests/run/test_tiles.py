"""Stages solved as tiles: the cut changes nothing."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jgptq.models.packed import unpack, validate
from jgptq.run.tiles import prepare_stage, solve_stage, tile_columns
from jgptq.settings.run import QuantizeConfig
from jgptq.solver import Outcome, solve
from jgptq.solver.statistics.drift import StageSums
from jgptq.solver.statistics.hessian import accumulate, empty, hessian

K = 64


@pytest.mark.parametrize("columns", [96, 128, 256, 320])  # an overlap, an overlap within a linear, whole, wider than the stage
@pytest.mark.parametrize(("bits", "sym"), [(4, True), (3, False)])
def test_tiles_give_what_each_linear_gives_alone(columns: int, bits: int, sym: bool):
    random = np.random.default_rng(0)
    kernels = tuple(jnp.asarray(random.normal(size=(K, n)), jnp.float16) for n in (64, 32, 160))
    total = accumulate(empty(K), jnp.asarray(random.normal(size=(200, K)), jnp.float32))
    config = QuantizeConfig(bits=bits, sym=sym, group_size=32)
    h_kk = hessian(total)
    solved = solve_stage(
        kernels, prepare_stage(StageSums(total, None), config), config, columns=columns, dtype=jnp.dtype(jnp.bfloat16)
    )
    assert Outcome(int(solved.outcome)) is Outcome.SOLVED
    for kernel, linear, expanded in zip(kernels, solved.linears, solved.kernels, strict=True):
        alone = solve(kernel.astype(jnp.float32), h_kk, config)
        validate(linear.packed, "linear")
        codes_kn, zero_gn = unpack(linear.packed)
        np.testing.assert_array_equal(codes_kn, alone.codes_kn)
        np.testing.assert_array_equal(zero_gn, alone.zero_gn)
        np.testing.assert_array_equal(linear.packed.scales, alone.scale_gn)
        np.testing.assert_array_equal(expanded, alone.dequantize().astype(jnp.bfloat16))
        np.testing.assert_allclose(linear.loss_n, alone.loss_n, rtol=1e-4)
        np.testing.assert_allclose(linear.rtn_loss_n, alone.rtn_loss_n, rtol=1e-4)


def test_the_worst_tile_decides_the_outcome():
    kernel = jnp.ones((K, 128), jnp.float32).at[0, 100].set(1e6)  # its scale is beyond float16
    total = accumulate(empty(K), jnp.asarray(np.random.default_rng(0).normal(size=(200, K)), jnp.float32))
    config = QuantizeConfig(group_size=32)
    solved = solve_stage(
        (kernel,), prepare_stage(StageSums(total, None), config), config, columns=32, dtype=jnp.dtype(jnp.float32)
    )
    assert Outcome(int(solved.outcome)) is Outcome.SCALE_OVERFLOW


@given(st.lists(st.integers(1, 900).map(lambda n: 32 * n), min_size=1, max_size=4))
def test_tiles_are_whole_units_and_bounded(widths: list[int]):
    columns = tile_columns(widths)
    assert columns % 32 == 0
    assert columns <= min(4096, max(widths))


def test_the_width_of_a_tile_weighs_steps_against_wasted_columns():
    assert tile_columns([2304, 768, 4096]) == 2304  # four tiles, where 768 would make ten
    assert tile_columns([4096]) == 4096
    assert tile_columns([28672, 4096]) == 4096
