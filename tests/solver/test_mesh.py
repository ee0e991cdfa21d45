"""Eight forced CPU devices against one: the Hessian, its factor, the codes, and what a device holds."""

import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import on_mesh
import pytest

from jgptq.errors import ConfigError
from jgptq.settings.presets import PRESETS
from jgptq.settings.run import QuantizeConfig
from jgptq.settings.solver import Method, Order
from jgptq.solver import ONE_DEVICE, Means, Outcome, Placement, Solution, prepare, solve, solve_columns
from jgptq.solver.linalg.triangular import backwards, lower_factor
from jgptq.solver.mesh import OnMesh, make_mesh, slabs

CASES = {on_mesh.name_of(mesh, case): (mesh, case) for mesh, cases in on_mesh.CASES.items() for case in cases}
FACTORED = [name for name, (_, case) in CASES.items() if case.get("method") != "rtn"]
PROGRAMS = ["accumulate", "accumulate drift", "prepare", "factor", *on_mesh.PROGRAMS]


@pytest.fixture(scope="module")
def arrays_on_mesh(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """The results of on_mesh.py on eight devices, in a process of its own: the number of devices is fixed when JAX starts."""
    path = tmp_path_factory.mktemp("mesh") / "arrays.npz"
    support = Path(__file__).parents[1] / "support"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
    }
    done = subprocess.run(
        [sys.executable, str(support / "on_mesh.py"), str(path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with np.load(path) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def dense() -> Means:
    """The means of the same sums on one device."""
    return ONE_DEVICE.means(on_mesh.summed(ONE_DEVICE))


def solution_of(arrays: dict[str, np.ndarray], name: str) -> Solution:
    return Solution(**{field: arrays.get(f"{name}/{field}") for field in Solution._fields})


@pytest.mark.parametrize("mesh", list(on_mesh.CASES))
def test_sums_in_slabs_are_the_dense_ones_and_their_padding_is_dead(arrays_on_mesh, dense: Means, mesh: str):
    k = on_mesh.K
    for name, expected in (("h", dense.h_kk), ("drift", dense.drift_kk)):
        sum_pp = arrays_on_mesh[f"{mesh}/{name}"]
        np.testing.assert_allclose(sum_pp[:k, :k], expected, rtol=1e-4, atol=1e-6 * float(abs(expected).max()))
        assert not sum_pp[k:].any()
        assert not sum_pp[:, k:].any()
    residual_kn = arrays_on_mesh[f"{mesh}/residual"]
    np.testing.assert_allclose(residual_kn, dense.residual_kn, rtol=1e-4, atol=1e-6 * float(abs(dense.residual_kn).max()))
    assert arrays_on_mesh[f"{mesh}/tokens"] == on_mesh.T


@pytest.mark.parametrize("name", FACTORED)
def test_factor_in_slabs_is_the_dense_one_and_each_device_holds_an_eighth(arrays_on_mesh, dense: Means, name: str):
    _, case = CASES[name]
    l_pp, k = arrays_on_mesh[f"{name}/factor"], on_mesh.K
    with jax.enable_x64(case.get("float64", False)):
        expected = backwards(prepare(dense.h_kk, on_mesh.config_of(case), dense.drift_kk).factor)
        np.testing.assert_allclose(l_pp[:k, :k], expected, rtol=1e-3, atol=1e-5 * float(expected.max()))
    np.testing.assert_array_equal(np.triu(l_pp, 1), 0)
    assert not l_pp[k:, :k].any()
    np.testing.assert_array_equal(arrays_on_mesh[f"{name}/shard"], [len(l_pp), len(l_pp) // 8])


# A weight half-way between two codes may fall either way, as sums are added up in another order.
@pytest.mark.parametrize("name", list(CASES))
def test_eight_devices_give_the_codes_of_one(arrays_on_mesh, dense: Means, name: str):
    _, case = CASES[name]
    solution, (_, expected) = solution_of(arrays_on_mesh, name), on_mesh.solved(ONE_DEVICE, dense, case)
    assert solution.codes_kn.shape == (on_mesh.K, on_mesh.N)
    assert np.mean(solution.codes_kn == np.asarray(expected.codes_kn)) >= 0.999
    refitted = case.get("preset") == "best" or "refit" in case  # a scale between two float16 may be either of them
    assert np.mean(solution.scale_gn == np.asarray(expected.scale_gn)) >= (0.9 if refitted else 0.999)
    np.testing.assert_allclose(solution.scale_gn, expected.scale_gn, rtol=2e-3)
    np.testing.assert_array_equal(solution.zero_gn, expected.zero_gn)
    assert (solution.group_k is None) == (expected.group_k is None)
    if solution.group_k is not None:
        np.testing.assert_array_equal(solution.group_k, expected.group_k)
    rel = 1e-3 if refitted else 1e-4
    assert float(solution.loss_n.sum()) == pytest.approx(float(np.sum(np.asarray(expected.loss_n))), rel=rel)
    np.testing.assert_allclose(solution.rtn_loss_n, expected.rtn_loss_n, rtol=1e-4)
    assert Outcome(int(solution.outcome)) is Outcome(int(expected.outcome))


def test_every_preset_method_and_order_is_among_the_cases():
    configs = [on_mesh.config_of(case) for _, case in CASES.values()]
    assert {config.method for config in configs} == set(get_args(Method))
    assert {config.order for config in configs} == set(get_args(Order))
    assert {case.get("preset") for _, case in CASES.values()} >= set(PRESETS)


def test_drift_and_residual_change_the_codes_of_the_cases_that_read_them(dense: Means):
    """Otherwise no case would show whether a mesh reads them."""
    for case, without in (
        ({"preset": "balanced"}, dense._replace(drift_kk=None)),
        ({"preset": "balanced"}, dense._replace(residual_kn=None)),
        ({"method": "gptaq", "order": "static", "scale": "mse"}, dense._replace(drift_kk=0.0 * dense.drift_kk)),
        ({"method": "qronos", "order": "desc_act"}, dense._replace(drift_kk=0.0 * dense.drift_kk)),
    ):
        both = [np.asarray(on_mesh.solved(ONE_DEVICE, means, case)[1].codes_kn) for means in (dense, without)]
        assert np.mean(both[0] != both[1]) > 0.01


def test_a_stage_is_solved_on_a_mesh_as_on_one_device(arrays_on_mesh):
    expected = on_mesh.stage_of(ONE_DEVICE)
    for index, linear in enumerate(expected.linears):
        np.testing.assert_array_equal(arrays_on_mesh[f"stage/{index}/codes"], linear.packed.qweight)
        np.testing.assert_allclose(arrays_on_mesh[f"stage/{index}/loss"], linear.loss_n, rtol=1e-4)


def test_damping_is_raised_as_on_one_device(arrays_on_mesh):
    expected = solve(jnp.ones((64, 32)), jnp.asarray(on_mesh.indefinite()), QuantizeConfig(group_size=32, damping=0.001))
    solution = solution_of(arrays_on_mesh, "raised")
    assert float(solution.damping) == float(expected.damping) == pytest.approx(0.01)
    assert Outcome(int(solution.outcome)) is Outcome.RAISED_DAMPING
    np.testing.assert_array_equal(solution.codes_kn, expected.codes_kn)
    assert np.isfinite(arrays_on_mesh["raised/factor"]).all()


@pytest.mark.parametrize(
    ("name", "outcome"),
    [
        ("zero", Outcome.ZERO_HESSIAN),
        ("nan", Outcome.NONFINITE_HESSIAN),
        ("nan drift", Outcome.NONFINITE_HESSIAN),
        ("negative", Outcome.NOT_A_HESSIAN),
        ("nonfinite", Outcome.NONFINITE_WEIGHTS),
        ("overflow", Outcome.SCALE_OVERFLOW),
    ],
)
def test_what_is_wrong_on_one_device_all_report(arrays_on_mesh, name: str, outcome: Outcome):
    assert Outcome(int(arrays_on_mesh[f"{name}/outcome"])) is outcome


def test_rows_that_fill_no_whole_number_of_tiles_are_each_updated_once(arrays_on_mesh):
    h_kk = jnp.asarray(arrays_on_mesh["tiles/h"])
    expected = lower_factor(h_kk, 0.01 * jnp.mean(jnp.diagonal(h_kk)))
    np.testing.assert_allclose(arrays_on_mesh["tiles/factor"], expected, atol=2e-5)


# In slabs, of which eight are the matrix: those that are read, that which is written, chunks of rows on their way, some panels.
MOST_SLABS = {"accumulate": 4.5, "accumulate drift": 4.5, "prepare": 5.5, "factor": 4.5, "solve gptaq": 8.0}


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_device_holds_the_whole_matrix(arrays_on_mesh, program: str):
    compiled = [4096] if program in on_mesh.PROGRAMS else [2048, 4096]
    assert not any(arrays_on_mesh[f"{program}/{k}/whole"] for k in compiled)
    assert arrays_on_mesh[f"{program}/4096/slabs"] < MOST_SLABS.get(program, 6.0)


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_do_not_grow_with_k(arrays_on_mesh, program: str):
    assert arrays_on_mesh[f"{program}/4096/text"] == pytest.approx(arrays_on_mesh[f"{program}/2048/text"], rel=0.01)


def test_a_mesh_of_one_device_is_the_same_code():
    h_tk, _, _, w_kn = on_mesh.problem()
    placement, config = OnMesh(make_mesh()), QuantizeConfig(group_size=64, refit=True)
    h = placement.means(placement.accumulate(placement.empty_sums(64, None, drift=False), jnp.asarray(h_tk[:, :64]))).h_kk
    solution = solve_columns(jnp.asarray(w_kn[:64]), prepare(h, config, placement=placement), config)
    expected = solve_columns(jnp.asarray(w_kn[:64]), prepare(h.values[:64, :64], config), config)
    np.testing.assert_array_equal(solution.codes_kn, expected.codes_kn)


@pytest.mark.parametrize(("k", "size"), [(1, 384), (384, 384), (385, 768)])
def test_padding_holds_whole_panels_and_equal_slabs(k: int, size: int):
    assert slabs.padded_size(k, jax.sharding.AbstractMesh((3, 1), ("data", "model"))) == size  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("axes", "message"),
    [({"data": 4, "model": 2}, "needs 8 devices, found 1"), ({"data": 0}, "at least 1"), ({"model": -1}, "at least 1")],
)
def test_a_mesh_that_devices_do_not_fill_is_refused(axes: dict[str, int], message: str):
    with pytest.raises(ConfigError, match=message):
        make_mesh(**axes, devices=jax.devices()[:1])


def test_axes_that_are_not_the_named_ones_are_refused():
    with pytest.raises(ConfigError, match="'data' and 'model'"):
        OnMesh(jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("x",)))


@pytest.mark.parametrize("placement", [ONE_DEVICE, OnMesh(make_mesh(devices=jax.devices()[:1]))], ids=["one device", "mesh"])
def test_what_does_not_fit_is_the_same_error_on_one_device_and_on_a_mesh(placement: Placement):
    config = QuantizeConfig(group_size=32)
    total, drifting = (placement.empty_sums(64, None, drift=drift) for drift in (False, True))
    with pytest.raises(ConfigError, match=r"activations of K=64 .* found K=32"):
        placement.accumulate(total, jnp.ones((8, 32)))
    with pytest.raises(ConfigError, match=r"float activations of K=64 .* found K=32"):
        placement.accumulate(drifting, jnp.ones((8, 64)), jnp.ones((8, 32)))
    with pytest.raises(ConfigError, match=r"expected h_float .* found None"):
        placement.accumulate(drifting, jnp.ones((8, 64)))
    h_kk = placement.means(total).h_kk
    narrow = placement.means(placement.empty_sums(32, None, drift=True)).drift_kk
    with pytest.raises(ConfigError, match=r"a drift of K=64 .* found K=32"):
        prepare(h_kk, config, narrow, placement=placement)
    prepared = prepare(h_kk, config, placement=placement)
    with pytest.raises(ConfigError, match=r"a kernel of K=64 .* found K=32"):
        solve_columns(jnp.ones((32, 32)), prepared, config)
    with pytest.raises(ConfigError, match=r"a kernel of K=64 .* found K=32"):
        solve(jnp.ones((32, 32)), h_kk, config, placement=placement)
    with pytest.raises(ConfigError, match=r"a residual of K=64 .* found K=32"):
        solve_columns(jnp.ones((64, 32)), prepared, config, jnp.ones((32, 32)))
    with pytest.raises(ConfigError, match="method 'gptaq' needs the drift"):
        prepare(h_kk, QuantizeConfig(group_size=32, method="gptaq"), placement=placement)
    with pytest.raises(ConfigError, match="method 'gptaq' needs the drift"):
        solve_columns(jnp.ones((64, 32)), prepared, QuantizeConfig(group_size=32, method="gptaq"))
    rtn = prepare(h_kk, QuantizeConfig(group_size=32, method="rtn"), placement=placement)
    with pytest.raises(ConfigError, match="prepared for method 'rtn', without a factor"):
        solve_columns(jnp.ones((64, 32)), rtn, config)
