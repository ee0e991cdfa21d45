"""The driver with the solver on a mesh."""

import os
import subprocess
import sys
from pathlib import Path

import driver_on_mesh
import numpy as np
import pytest


@pytest.fixture(scope="module")
def on_mesh(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Codes from eight devices, in a process of its own: the number of devices is fixed when JAX starts."""
    path = tmp_path_factory.mktemp("mesh") / "codes.npz"
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    support = Path(driver_on_mesh.__file__)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, str(support), str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(path) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("preset", dict(driver_on_mesh.RUNS))
def test_a_mesh_gives_the_codes_of_one_device_but_for_ties(on_mesh: dict[str, np.ndarray], preset: str):
    codes, loss = driver_on_mesh.quantized(preset)
    for mesh in (mesh for name, mesh in driver_on_mesh.RUNS if name == preset):
        assert np.mean(on_mesh[f"{preset}/{mesh}/codes"] != codes) < 0.01
        np.testing.assert_allclose(on_mesh[f"{preset}/{mesh}/loss"], loss, rtol=1e-2)
