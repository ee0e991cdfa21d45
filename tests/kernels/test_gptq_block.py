"""The solver's inner loop as a kernel, in Pallas' interpreter, against plain JAX and against a float64 oracle."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgptq.settings.run import QuantizeConfig
from jgptq.solver import compensate, prepare, solve_columns
from jgptq.solver.grid import search_grid
from pallas_kernels import Given, Searched, gptq_block


def problem(rows: int, n: int, *, shared: bool, drifts: bool, exact: bool, seed: int = 0) -> tuple:
    """A block; where `exact` is asked for, of such few bits that no sum is rounded, whatever its order."""
    random = np.random.default_rng(seed)
    if exact:
        # Halves and few terms: codes fall on ties again and again.
        u_rr = np.eye(rows) + np.triu(random.integers(-1, 2, (rows, rows)) * (random.random((rows, rows)) < 0.05), 1)
        w_rn = random.integers(-24, 25, (rows, n)) / 2
        scale_rn = np.ones((1 if shared else rows, n))
    else:
        factor = np.linalg.cholesky(np.cov(random.standard_normal((rows, 4 * rows))) + 0.1 * np.eye(rows))
        u_rr, w_rn = factor.T, random.standard_normal((rows, n))
        scale_rn = random.uniform(0.1, 0.3, (1 if shared else rows, n))
    zero_rn = random.integers(0, 16, scale_rn.shape)
    drift_rr = np.triu(u_rr, 1) * 0.5 if drifts else None
    w_rn, u_rr, scale_rn, zero_rn = (jnp.asarray(part, jnp.float32) for part in (w_rn, u_rr, scale_rn, zero_rn))
    return w_rn, u_rr, Given(scale_rn, zero_rn), None if drift_rr is None else jnp.asarray(drift_rr, jnp.float32)


def searched(rows: int, of_group: int, **settings: object) -> Searched:
    """Grids of a block that are found on the way, with the solver's search."""
    weight_r = jnp.asarray(np.random.default_rng(rows).lognormal(size=rows), jnp.float32)
    return Searched(
        weight_r, of_group, lambda w_rn, weight_r, arithmetic: search_grid(w_rn, weight_r, arithmetic=arithmetic, **settings)
    )


@pytest.mark.parametrize(("rows", "n", "shared", "drifts"), [(32, 40, True, False), (64, 16, False, True), (128, 16, True, True)])
def test_codes_are_bit_identical_where_sums_are_exact(rows, n, shared, drifts):
    # A drift grows what it adds to, so that its sums are exact for a few rows only.
    block = problem(rows, n, shared=shared, drifts=False, exact=True)
    found, expected = (gptq_block(*block, bits=4, backend=backend) for backend in ("interpret", "jax"))
    np.testing.assert_array_equal(found.codes_rn, expected.codes_rn)
    np.testing.assert_array_equal(found.error_rn, expected.error_rn)
    scaled = np.asarray(block[0])
    assert np.any(scaled * 2 % 2 == 1), "no weight begins on a tie"


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("rows", "n", "shared", "drifts"),
    [(32, 40, True, False), (64, 16, False, True), (96, 16, True, True), (128, 16, True, False)],
)
def test_the_kernel_takes_the_steps_of_plain_jax(rows, n, shared, drifts, bits):
    block = problem(rows, n, shared=shared, drifts=drifts, exact=False)
    found, expected = (gptq_block(*block, bits=bits, backend=backend) for backend in ("interpret", "jax"))
    assert found.turn_rn.shape == expected.turn_rn.shape == ((rows, n) if drifts else (0, n))
    # A column goes its own way from the first code that falls on a tie; such columns must be rare.
    same = np.all(np.asarray(found.codes_rn) == np.asarray(expected.codes_rn), axis=0)
    assert np.mean(same) > 0.9
    np.testing.assert_allclose(found.error_rn[:, same], expected.error_rn[:, same], atol=2e-4)
    np.testing.assert_allclose(found.turn_rn[:, same], expected.turn_rn[:, same], atol=2e-4)


@pytest.mark.parametrize(
    ("rows", "of_group", "n", "drifts", "settings"),
    [
        (128, 128, 16, False, {"bits": 4, "sym": True, "scale": "hessian"}),
        (128, 32, 40, True, {"bits": 3, "sym": False, "scale": "mse"}),
        (96, 32, 16, False, {"bits": 4, "sym": False, "scale": "minmax"}),
        (96, 96, 16, False, {"bits": 4, "sym": True, "scale": "mse"}),
        (64, 64, 16, True, {"bits": 2, "sym": True, "scale": "hessian"}),
    ],
)
def test_the_kernel_finds_the_grids_of_plain_jax(rows, of_group, n, drifts, settings):
    w_rn, u_rr, _, drift_rr = problem(rows, n, shared=True, drifts=drifts, exact=False)
    grids = searched(rows, of_group, **settings)
    found, expected = (
        gptq_block(w_rn, u_rr, grids, drift_rr, bits=settings["bits"], backend=backend) for backend in ("interpret", "jax")
    )
    assert found.scale_gn.shape == found.zero_gn.shape == (rows // of_group, n)
    # The first group is searched before anything is added, so that only the sum of its errors may be rounded otherwise.
    assert np.mean(np.asarray(found.scale_gn[0]) == np.asarray(expected.scale_gn[0])) > 0.9
    same = np.all(np.asarray(found.codes_rn) == np.asarray(expected.codes_rn), axis=0)
    assert np.mean(same) > 0.9
    np.testing.assert_allclose(found.scale_gn[:, same], expected.scale_gn[:, same], rtol=2e-3)
    np.testing.assert_array_equal(found.zero_gn[:, same], expected.zero_gn[:, same])
    np.testing.assert_allclose(found.error_rn[:, same], expected.error_rn[:, same], atol=2e-3)


@pytest.mark.parametrize("backend", ["interpret", "jax"])
def test_a_group_is_given_its_grid_when_its_turn_comes(backend):
    w_rn, u_rr, _, _ = problem(128, 16, shared=True, drifts=False, exact=False, seed=5)
    settings = {"bits": 4, "sym": False, "scale": "hessian"}
    grids = searched(128, 32, **settings)
    found = gptq_block(w_rn, u_rr, grids, bits=4, backend=backend)
    rows, u = np.asarray(w_rn, np.float64), np.asarray(u_rr, np.float64)
    for start in range(0, 128, 32):
        group = jnp.asarray(rows[start : start + 32], jnp.float32)
        expected = search_grid(group, grids.weight_r[start : start + 32], **settings)
        at = start // 32
        assert np.mean(np.asarray(found.scale_gn[at]) == np.asarray(expected.scale_n)) > 0.8
        for k in range(start, start + 32):
            rows[k + 1 :] -= u[k, k + 1 :, None] * np.asarray(found.error_rn[k], np.float64)


def test_the_kernel_follows_the_published_loop():
    block = problem(32, 16, shared=False, drifts=True, exact=False, seed=3)
    w, u, scale, zero, drift = (np.asarray(part, np.float64) for part in (*block[:2], *block[2], block[3]))
    found = gptq_block(*block, bits=4, backend="interpret")
    rows = w.copy()
    for k in range(32):
        code = np.clip(np.round(rows[k] / scale[k]) + zero[k], 0, 15)
        error = (rows[k] - scale[k] * (code - zero[k])) / u[k, k]
        np.testing.assert_array_equal(found.codes_rn[k], code)
        np.testing.assert_allclose(found.error_rn[k], error, atol=1e-4)
        turn = rows[k].copy()
        rows[k + 1 :] += drift[k, k + 1 :, None] * turn - u[k, k + 1 :, None] * error


def test_shapes_that_do_not_agree_are_named():
    w, u, grids, _ = problem(32, 16, shared=True, drifts=False, exact=False)
    with pytest.raises(ValueError, match=r"u must be \[32, 32\] for w \[32, 16\], found \[31, 32\]"):
        gptq_block(w, u[1:], grids, bits=4)
    with pytest.raises(ValueError, match=r"scale must be \[32, 16\] or \[1, 16\] for w \[32, 16\], found \[1, 8\]"):
        gptq_block(w, u, grids._replace(scale_rn=grids.scale_rn[:, :8]), bits=4)
    minmax = searched(32, 32, bits=4, sym=True, scale="minmax")
    with pytest.raises(ValueError, match=r"weight must be \[32\] for w \[32, 16\], found \[31\]"):
        gptq_block(w, u, dataclasses.replace(minmax, weight_r=minmax.weight_r[1:]), bits=4)
    with pytest.raises(ValueError, match=r"rows in a group must be a multiple of 32 that divides 32, found 16"):
        gptq_block(w, u, dataclasses.replace(minmax, rows=16), bits=4)
    with pytest.raises(ValueError, match=r"takes float32 and up to 128 rows, found float32 and 160"):
        gptq_block(*problem(160, 16, shared=True, drifts=False, exact=False)[:3], bits=4, backend="interpret")
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
def test_the_solver_finds_its_codes_with_the_kernel(settings, monkeypatch):
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
    found = solve_columns(w_kn, prepare(h_kk, config, drift_kk), config)
    jax.clear_caches()
    assert launches == [96 if config.group_size == 192 else 128]
    same = np.all(np.asarray(found.codes_kn) == np.asarray(expected.codes_kn), axis=0)
    assert np.mean(same) >= 0.8
    np.testing.assert_allclose(found.loss_n, expected.loss_n, rtol=0.1)
    np.testing.assert_allclose(found.loss_n[same], expected.loss_n[same], rtol=1e-3)
