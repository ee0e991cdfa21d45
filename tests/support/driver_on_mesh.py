"""The driver on eight CPU devices: `python driver_on_mesh.py OUT.npz` quantizes the tiny decoder with the solver on a mesh."""

import sys

import jax
import numpy as np
import tiny

import jgptq
from jgptq.models import Decoder
from jgptq.models.packed import unpack
from jgptq.solver import ONE_DEVICE, Placement
from jgptq.solver.mesh import OnMesh, make_mesh

MESHES = {"8x1": (8, 1), "4x2": (4, 2), "2x4": (2, 4)}
RUNS = (("fast", "8x1"), ("balanced", "4x2"), ("balanced", "2x4"))


def codes(params: Decoder) -> np.ndarray:
    """The codes of all linears of all blocks, one after the other."""
    kernels = [linear.kernel.get_value() for block in params.layers for linear in block.linears().values()]
    return np.concatenate([np.asarray(unpack(kernel)[0]).reshape(-1) for kernel in kernels])


def quantized(preset: str, placement: Placement = ONE_DEVICE) -> tuple[np.ndarray, np.ndarray]:
    """The codes that a preset gives, and the loss of each linear."""
    params, report = jgptq.quantize(tiny.decoder(), tiny.tokens(), preset=preset, group_size=32, placement=placement)
    return codes(params), np.asarray([row.loss for row in report.rows])


if __name__ == "__main__":
    assert jax.device_count() == 8
    on_mesh = {name: OnMesh(make_mesh(data=data, model=model)) for name, (data, model) in MESHES.items()}
    arrays = {}
    for preset, name in RUNS:
        arrays[f"{preset}/{name}/codes"], arrays[f"{preset}/{name}/loss"] = quantized(preset, on_mesh[name])
    np.savez(sys.argv[1], **arrays)
