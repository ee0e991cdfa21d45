"""The solver's inner loop as a kernel, in Pallas' interpreter, against plain JAX and against a float64 oracle."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_blocks import block_of

from jgptq.settings.run import QuantizeConfig
from jgptq.solver import prepare, solve_columns
from jgptq.solver.codes import compensate
from jgptq.solver.codes.grid import search_grid
from pallas_kernels import gptq_block
from pallas_kernels.gptq_block.shapes import Shape, shapes_of


def shape_of(rows: int, n: int, grids: str = "shared", **settings: object) -> Shape:
    return Shape(rows=rows, n=n, grids=grids, uses=frozenset(), **settings)


@pytest.mark.parametrize("shape", shapes_of("test_given"), ids=str)
def test_codes_are_bit_identical_where_sums_are_exact(shape):
    # A drift grows what it adds to, so that its sums are exact for a few rows only.
    block = block_of(dataclasses.replace(shape, drift=False), exact=True)
    kernel, plain = (gptq_block(*block, bits=4, backend=backend) for backend in ("interpret", "jax"))
    np.testing.assert_array_equal(kernel.codes_rn, plain.codes_rn)
    np.testing.assert_array_equal(kernel.error_rn, plain.error_rn)
    scaled = np.asarray(block[0])
    assert np.any(scaled * 2 % 2 == 1), "no weight begins on a tie"


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", shapes_of("test_given"), ids=str)
def test_the_kernel_takes_the_steps_of_plain_jax(shape, bits):
    block = block_of(shape)
    kernel, plain = (gptq_block(*block, bits=bits, backend=backend) for backend in ("interpret", "jax"))
    assert kernel.updated_rn.shape == plain.updated_rn.shape == (shape.rows if shape.drift else 0, shape.n)
    # A column differs from the first code that falls on a tie; such columns must be rare.
    same = np.all(np.asarray(kernel.codes_rn) == np.asarray(plain.codes_rn), axis=0)
    assert np.mean(same) > 0.9
    np.testing.assert_allclose(kernel.error_rn[:, same], plain.error_rn[:, same], atol=2e-4)
    np.testing.assert_allclose(kernel.updated_rn[:, same], plain.updated_rn[:, same], atol=2e-4)


@pytest.mark.parametrize("shape", shapes_of("test_searched"), ids=str)
def test_the_kernel_searches_the_grids_of_plain_jax(shape):
    block = block_of(shape)
    kernel, plain = (gptq_block(*block, bits=shape.bits, backend=backend) for backend in ("interpret", "jax"))
    assert kernel.scale_gn.shape == kernel.zero_gn.shape == (shape.rows // shape.group_size, shape.n)
    # The first group is searched before anything is added, so that only the sum of its errors may be rounded otherwise.
    assert np.mean(np.asarray(kernel.scale_gn[0]) == np.asarray(plain.scale_gn[0])) > 0.9
    same = np.all(np.asarray(kernel.codes_rn) == np.asarray(plain.codes_rn), axis=0)
    assert np.mean(same) > 0.9
    np.testing.assert_allclose(kernel.scale_gn[:, same], plain.scale_gn[:, same], rtol=2e-3)
    np.testing.assert_array_equal(kernel.zero_gn[:, same], plain.zero_gn[:, same])
    np.testing.assert_allclose(kernel.error_rn[:, same], plain.error_rn[:, same], atol=2e-3)


@pytest.mark.parametrize("backend", ["interpret", "jax"])
def test_the_grid_of_a_group_is_searched_after_the_updates_of_all_rows_before_it(backend):
    shape = shape_of(128, 16, "searched", group_size=32, sym=False)
    w_rn, u_rr, grids, _ = block_of(shape, seed=5)
    result = gptq_block(w_rn, u_rr, grids, bits=4, backend=backend)
    rows, u = np.asarray(w_rn, np.float64), np.asarray(u_rr, np.float64)
    for start in range(0, 128, 32):
        group = jnp.asarray(rows[start : start + 32], jnp.float32)
        expected = search_grid(group, grids.weight_r[start : start + 32], bits=4, sym=False, scale="hessian")
        assert np.mean(np.asarray(result.scale_gn[start // 32]) == np.asarray(expected.scale_n)) > 0.8
        for k in range(start, start + 32):
            rows[k + 1 :] -= u[k, k + 1 :, None] * np.asarray(result.error_rn[k], np.float64)


def test_the_kernel_follows_the_published_loop():
    block = block_of(shape_of(32, 16, "per_row", drift=True), seed=3)
    w, u, scale, zero, drift = (np.asarray(part, np.float64) for part in (*block[:2], *block[2], block[3]))
    result = gptq_block(*block, bits=4, backend="interpret")
    rows = w.copy()
    for k in range(32):
        code = np.clip(np.round(rows[k] / scale[k]) + zero[k], 0, 15)
        error = (rows[k] - scale[k] * (code - zero[k])) / u[k, k]
        np.testing.assert_array_equal(result.codes_rn[k], code)
        np.testing.assert_allclose(result.error_rn[k], error, atol=1e-4)
        updated = rows[k].copy()
        rows[k + 1 :] += drift[k, k + 1 :, None] * updated - u[k, k + 1 :, None] * error


def test_shapes_that_do_not_agree_are_named():
    w, u, grids, _ = block_of(shape_of(32, 16))
    with pytest.raises(ValueError, match=r"u must be \[32, 32\] for w \[32, 16\], found \[31, 32\]"):
        gptq_block(w, u[1:], grids, bits=4)
    with pytest.raises(ValueError, match=r"scale must be \[32, 16\] or \[1, 16\] for w \[32, 16\], found \[1, 8\]"):
        gptq_block(w, u, grids._replace(scale_rn=grids.scale_rn[:, :8]), bits=4)
    minmax = block_of(shape_of(32, 16, "searched", group_size=32, scale="minmax"))[2]
    with pytest.raises(ValueError, match=r"weight must be \[32\] for w \[32, 16\], found \[31\]"):
        gptq_block(w, u, dataclasses.replace(minmax, weight_r=minmax.weight_r[1:]), bits=4)
    with pytest.raises(ValueError, match=r"group_size must be a multiple of 32 that divides R = 32, found 16"):
        gptq_block(w, u, dataclasses.replace(minmax, group_size=16), bits=4)
    with pytest.raises(ValueError, match=r"takes float32 and up to 128 rows, found float32 and 160"):
        gptq_block(*block_of(shape_of(160, 16))[:3], bits=4, backend="interpret")
    with pytest.raises(ValueError, match="backend 'mosaic' has no kernel for this"):
        gptq_block(w, u, grids, bits=4, backend="mosaic")


@pytest.mark.parametrize(
    "settings",
    [
        {"group_size": -1, "sym": False},
        {"group_size": 192, "sym": False},
        {"group_size": 32, "method": "gptaq"},
        {"group_size": 128, "order": "static"},
    ],
)
def test_the_solver_computes_its_codes_with_the_kernel(settings, monkeypatch):
    random = np.random.default_rng(0)
    h_tk = random.standard_normal((1024, 384)) * random.lognormal(size=384)
    h_kk, w_kn = (jnp.asarray(a, jnp.float32) for a in (h_tk.T @ h_tk / 512, random.standard_normal((384, 16)) * 0.1))
    config = QuantizeConfig(**settings)
    drift_kk = 0.01 * h_kk if config.method == "gptaq" else None
    expected = solve_columns(w_kn, prepare(h_kk, config, drift_kk), config)
    launches = []

    def interpreted(*operands, bits):
        launches.append(operands[0].shape[0])
        return gptq_block(*operands, bits=bits, backend="interpret")

    jax.clear_caches()  # programs that were traced with plain JAX
    monkeypatch.setattr(compensate, "gptq_block", interpreted)
    solution = solve_columns(w_kn, prepare(h_kk, config, drift_kk), config)
    jax.clear_caches()
    assert launches == [96 if config.group_size == 192 else 128]
    same = np.all(np.asarray(solution.codes_kn) == np.asarray(expected.codes_kn), axis=0)
    assert np.mean(same) >= 0.8
    np.testing.assert_allclose(solution.loss_n, expected.loss_n, rtol=0.1)
    np.testing.assert_allclose(solution.loss_n[same], expected.loss_n[same], rtol=1e-3)
