"""The GPU compiler without a GPU: topologies of NVIDIA devices that need not be there.

The two packages that hold it go into a folder of their own, so that other programs do not look for a GPU (`make .aot/ready`).
"""

import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

# What the compiler must know of the device; from its data sheets.
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
_REGISTERS, _FRAME = 0x2F, 0x11  # attributes of a kernel in a cubin's .nv.info


def topology(devices: int) -> Any:
    """H200s of one host."""
    _tell_pallas()
    return topologies.get_topology_desc(platform="cuda", topology_name="h200", topology=f"1x{devices}x1", target_config=H200)


def _tell_pallas() -> None:
    """Pallas asks the device for its architecture, from jax 0.11 on without a default."""
    try:
        from jax._src.pallas.triton import gpu_info
    except ImportError:
        return
    found = gpu_info.GpuInfo(gpu_version=gpu_info.GpuVersion.H200, arch_name="9.0", compute_capability=90)
    gpu_info.get_gpu_info = lambda: found


def compiled(function: Callable[..., Any], operands: list[jax.ShapeDtypeStruct], target: Any) -> Any:
    """The function compiled for the first device of a topology."""
    place = SingleDeviceSharding(target.devices[0])
    placed = [jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=place) for one in operands]
    return jax.jit(function).lower(*placed).compile()


def kernels(executable: Any) -> dict[str, dict[str, int]]:
    """Registers and bytes of stack a thread, of every kernel in a compiled program: spilled registers lie on the stack."""
    found: dict[str, dict[str, int]] = {}
    for cubin in _cubins(executable.runtime_executable().serialize()):
        found |= _resources(cubin)
    return found


def _cubins(blob: bytes) -> Iterator[bytes]:
    starts = []
    at = blob.find(b"\x7fELF")
    while at >= 0:
        starts.append(at)
        at = blob.find(b"\x7fELF", at + 4)
    for start, stop in zip(starts, [*starts[1:], len(blob)], strict=True):
        yield blob[start:stop]


def _resources(elf: bytes) -> dict[str, dict[str, int]]:
    """Reads a cubin's sections: names of symbols, and the attributes that `.nv.info` holds of them."""
    table, entry, count, names_at = struct.unpack_from("<Q", elf, 0x28)[0], *struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", elf, table + entry * index) for index in range(count)]

    def text(section: tuple[Any, ...], offset: int) -> str:
        start = section[4] + offset
        return elf[start : elf.index(b"\0", start)].decode()

    sections = {text(headers[names_at], header[0]): header for header in headers}
    if ".nv.info" not in sections or ".symtab" not in sections:
        return {}
    symbols = sections[".symtab"]
    strings = headers[symbols[6]]
    info = sections[".nv.info"]
    found: dict[str, dict[str, int]] = {}
    at, stop = info[4], info[4] + info[5]
    while at < stop:
        form, attribute, size = struct.unpack_from("<BBH", elf, at)
        at += 4
        if form == 4 and attribute in (_REGISTERS, _FRAME):
            symbol, value = struct.unpack_from("<II", elf, at)
            name = text(strings, struct.unpack_from("<I", elf, symbols[4] + 24 * symbol)[0])
            found.setdefault(name, {})["registers" if attribute == _REGISTERS else "stack"] = value
        at += size if form == 4 else 0
    return found


def read_json(path: Path) -> Any:
    """A JSON file, or an empty object where there is none."""
    return json.loads(path.read_text()) if path.exists() else {}
