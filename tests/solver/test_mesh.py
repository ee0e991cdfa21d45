"""Eight forced CPU devices against one: the Hessian, its factor, the codes, and what a device holds."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import on_mesh
import pytest

from jgptq.errors import ConfigError
from jgptq.settings.run import QuantizeConfig
from jgptq.solver import Outcome, Solution, prepare, solve, solve_columns
from jgptq.solver.hessian import accumulate, empty, hessian
from jgptq.solver.linalg.triangular import backwards, lower_factor
from jgptq.solver.mesh import sharded, slabs
from jgptq.solver.mesh.axes import make_mesh

MESHES = [f"{data}x{model}" for data, model in on_mesh.MESHES]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """What eight devices found, in a process of their own: the number of devices is fixed when JAX starts."""
    path = tmp_path_factory.mktemp("mesh") / "found.npz"
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
def dense() -> tuple[jax.Array, jax.Array]:
    """Weights and Hessian of the same problem on one device."""
    h_tk, w_kn = on_mesh.problem()
    return jnp.asarray(w_kn), hessian(accumulate(empty(on_mesh.K), jnp.asarray(h_tk)))


def solution_of(found: dict[str, np.ndarray], name: str) -> Solution:
    return Solution(**{field: found.get(f"{name}/{field}") for field in Solution._fields})


@pytest.mark.parametrize("mesh", MESHES)
def test_hessian_in_slabs_is_the_dense_one_and_its_padding_is_dead(found, dense, mesh: str):
    h_pp, k = found[f"{mesh}/h"], on_mesh.K
    np.testing.assert_allclose(h_pp[:k, :k], dense[1], rtol=1e-4, atol=1e-6 * float(dense[1].max()))
    assert not h_pp[k:].any()
    assert not h_pp[:, k:].any()
    assert found[f"{mesh}/tokens"] == on_mesh.T


@pytest.mark.parametrize("mesh", MESHES)
def test_factor_in_slabs_is_the_dense_one_and_each_device_holds_an_eighth(found, dense, mesh: str):
    l_pp, k = found[f"{mesh}/factor"], on_mesh.K
    expected = backwards(prepare(dense[1], QuantizeConfig(**on_mesh.CONFIGS[mesh])).r_kk)
    np.testing.assert_allclose(l_pp[:k, :k], expected, rtol=1e-3, atol=1e-5 * float(expected.max()))
    np.testing.assert_array_equal(np.triu(l_pp, 1), 0)
    assert not l_pp[k:, :k].any()
    np.testing.assert_array_equal(found[f"{mesh}/shard"], [len(l_pp), len(l_pp) // 8])


# A weight half-way between two codes may fall either way, as sums are added up in another order; on this problem none does.
@pytest.mark.parametrize("mesh", MESHES)
def test_eight_devices_give_the_codes_of_one(found, dense, mesh: str):
    solution = solution_of(found, mesh)
    expected = solve(*dense, QuantizeConfig(**on_mesh.CONFIGS[mesh]))
    assert solution.codes_kn.shape == (on_mesh.K, on_mesh.N)
    assert np.mean(solution.codes_kn == np.asarray(expected.codes_kn)) >= 0.999
    assert np.mean(solution.scale_gn == np.asarray(expected.scale_gn)) >= 0.999
    np.testing.assert_array_equal(solution.zero_gn, expected.zero_gn)
    assert float(solution.loss_n.sum()) == pytest.approx(float(expected.loss_n.sum()), rel=1e-4)
    np.testing.assert_allclose(solution.rtn_loss_n, expected.rtn_loss_n, rtol=1e-4)
    assert Outcome(int(solution.outcome)) is Outcome.SOLVED


def test_damping_is_raised_as_on_one_device(found):
    expected = solve(jnp.ones((64, 32)), jnp.asarray(on_mesh.indefinite()), QuantizeConfig(group_size=32, damping=0.001))
    solution = solution_of(found, "raised")
    assert float(solution.damping) == float(expected.damping) == pytest.approx(0.01)
    assert Outcome(int(solution.outcome)) is Outcome.RAISED_DAMPING
    np.testing.assert_array_equal(solution.codes_kn, expected.codes_kn)
    assert np.isfinite(found["raised/factor"]).all()


@pytest.mark.parametrize(
    ("name", "outcome"),
    [
        ("zero", Outcome.ZERO_HESSIAN),
        ("nan", Outcome.NONFINITE_HESSIAN),
        ("negative", Outcome.NOT_A_HESSIAN),
        ("nonfinite", Outcome.NONFINITE_WEIGHTS),
        ("overflow", Outcome.SCALE_OVERFLOW),
    ],
)
def test_what_one_device_finds_wrong_all_report(found, name: str, outcome: Outcome):
    assert Outcome(int(found[f"{name}/outcome"])) is outcome


def test_round_to_nearest_on_a_mesh_is_that_of_one_device(found):
    config = QuantizeConfig(group_size=32, method="rtn")
    expected = solve(jnp.ones((64, 32)), jnp.asarray(on_mesh.indefinite()), config)
    solution = solution_of(found, "rtn")
    np.testing.assert_array_equal(solution.codes_kn, expected.codes_kn)
    np.testing.assert_allclose(solution.loss_n, expected.loss_n, rtol=1e-4)
    assert Outcome(int(solution.outcome)) is Outcome.ROUNDED


def test_rows_that_fill_no_whole_number_of_tiles_are_each_updated_once(found):
    h_kk = jnp.asarray(found["tiles/h"])
    expected = lower_factor(h_kk, 0.01 * jnp.mean(jnp.diagonal(h_kk)))
    np.testing.assert_allclose(found["tiles/factor"], expected, atol=2e-5)


@pytest.mark.parametrize("program", ["accumulate", "factor", "solve"])
def test_no_device_holds_the_whole_matrix(found, program: str):
    for k in (2048, 4096):
        assert not found[f"{program}/{k}/whole"]
    # In slabs, of which eight are the matrix: those that are read, that which is written, a chunk on its way, some panels.
    assert found[f"{program}/4096/slabs"] < 4.5


@pytest.mark.parametrize("program", ["accumulate", "factor", "solve"])
def test_programs_do_not_grow_with_k(found, program: str):
    assert found[f"{program}/4096/text"] == pytest.approx(found[f"{program}/2048/text"], rel=0.01)


def test_a_mesh_of_one_device_is_the_same_code():
    h_tk, w_kn = on_mesh.problem()
    mesh, config = make_mesh(), QuantizeConfig(group_size=64)
    total = slabs.accumulate(slabs.empty(64, mesh), jnp.asarray(h_tk[:, :64]))
    h = slabs.hessian(total)
    solution = sharded.solve_columns(jnp.asarray(w_kn[:64]), sharded.prepare(h, config), config)
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


def test_shapes_and_axes_that_do_not_fit_are_refused():
    mesh = make_mesh(devices=jax.devices()[:1])
    with pytest.raises(ConfigError, match="'data' and 'model'"):
        slabs.empty(64, jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("x",)))
    total = slabs.empty(64, mesh)
    with pytest.raises(ConfigError, match="32 features"):
        slabs.accumulate(total, jnp.ones((8, 32)))
    h, rtn = slabs.hessian(slabs.empty(64, mesh)), QuantizeConfig(group_size=32, method="rtn")
    prepared = sharded.prepare(h, rtn)
    with pytest.raises(ConfigError, match="32 in-features"):
        sharded.solve_columns(jnp.ones((32, 32)), prepared, rtn)
    with pytest.raises(ConfigError, match='method "rtn"'):
        sharded.solve_columns(jnp.ones((64, 32)), prepared, QuantizeConfig(group_size=32))
