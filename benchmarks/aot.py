"""The GPU compiler without a GPU: programs are compiled for the topology of an H200.

The two packages that hold the compiler go into a folder of their own, so that other programs do not look for a GPU
(`make .aot/ready`).
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

jax.config.update("jax_platforms", "cpu")  # a topology's devices compile and hold no arrays

# What the compiler reads of a device; from its data sheets. `benchmarks/gpu/environment.py` writes that of a GPU that is there.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98
  device_memory_size: 150000000000 shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H200"
"""


def topology(devices: int) -> Any:
    """H200s of one host."""
    _set_architecture()
    return topologies.get_topology_desc(platform="cuda", topology_name="h200", topology=f"1x{devices}x1", target_config=H200)


def _set_architecture() -> None:
    """Gives Pallas the architecture, which from jax 0.11 on it asks the device for."""
    try:
        from jax._src.pallas.triton import gpu_info
    except ImportError:
        return
    h200 = gpu_info.GpuInfo(gpu_version=gpu_info.GpuVersion.H200, arch_name="9.0", compute_capability=90)
    gpu_info.get_gpu_info = lambda: h200


def compiled(function: Callable[..., Any], operands: list[Any], target: Any) -> Any:
    """The function compiled for the first device of a topology; operands are pytrees of `jax.ShapeDtypeStruct`."""
    place = SingleDeviceSharding(target.devices[0])
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), operands)
    return jax.jit(function).lower(*placed).compile()
