"""One linear on eight devices: what a device holds at the largest size, compiled for GPUs that need not be there, and the codes.

    make .aot/ready
    PYTHONPATH=.aot .venv/bin/python benchmarks/bench_mesh.py

(a) The down projection of a 405B Llama (K = 53248, N = 16384; its Hessian is 11.3 GB) for eight H200s of one host: the sum over a
batch of 8 x 4096 tokens in bfloat16, the factorization, the solve, and all three as one program. Bytes are of one device, as
XLA's buffer assignment has them after compiling for the topology; no GPU runs, and none is needed. The two packages hold the
compiler alone (`--no-deps`: no CUDA library comes along), in a folder of their own so that other programs do not look for a GPU.
Workspaces that cuSOLVER takes when it runs are not in these figures; for a panel of 128 rows they are below a megabyte.
(b) The codes of eight forced CPU devices against those of one, in processes of their own.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":
    # Another process of this script may be the one with the topology's compiler; arrays live on the CPU in all of them.
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from aot import topology
from common import circumstances, write_result
from jax.sharding import Mesh, NamedSharding
from jgptq.solver.order import row_order

from jgptq.settings.run import QuantizeConfig
from jgptq.solver import Solution, solve
from jgptq.solver import hessian as dense
from jgptq.solver.compensate import solver_block
from jgptq.solver.mesh import sharded, slabs
from jgptq.solver.mesh.axes import by_columns, by_tokens, make_mesh, replicated

K, N, TOKENS = 53248, 16384, 8 * 4096
LIMIT_GB = 6.0
MESHES = ((8, 1), (4, 2), (2, 4))
CODES_K, CODES_N, CODES_T = 1024, 512, 4096


def abstract(shape: tuple[int, ...], dtype: Any, where: NamedSharding) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)


def step(total: slabs.SlabSum, h_tk: jax.Array, w_kn: jax.Array, config: QuantizeConfig) -> tuple[slabs.Slabs, Solution]:
    """A whole linear, from activations to codes; the Hessian is returned too, so that it may stay in the memory of the sum."""
    h = slabs.hessian(slabs.accumulate(total, h_tk))
    return h, sharded.solve_columns(w_kn, sharded.prepare(h, config), config)


def compiled_for(mesh: Mesh) -> dict[str, Any]:
    """Bytes and seconds of each program on this mesh."""
    config = QuantizeConfig()
    size = slabs.padded_size(K, mesh)
    h = slabs.Slabs(abstract((size, size), jnp.float32, by_columns(mesh)), K, mesh)
    total = slabs.SlabSum(h, abstract((), jnp.int32, replicated(mesh)))
    h_tk = abstract((TOKENS, K), jnp.bfloat16, by_tokens(mesh))
    w_kn = abstract((K, N), jnp.float32, by_columns(mesh))
    diag_k = jax.ShapeDtypeStruct((K,), jnp.float32)
    order = jax.eval_shape(lambda diag_k: row_order("none", diag_k, config.group_size), diag_k)
    block = solver_block(K, config.group_size)
    u_cbb = jax.ShapeDtypeStruct((K // block, block, block), jnp.float32)
    small = (u_cbb, order, diag_k, jnp.float32(0), jnp.int32(0))
    small = jax.tree.map(lambda s: abstract(s.shape, s.dtype, replicated(mesh)), small)
    lowered = {
        "accumulate": lambda: slabs.accumulate.lower(total, h_tk),
        "factor": lambda: sharded.factored.lower(h, config),
        "solve": lambda: sharded.solve_columns.lower(w_kn, sharded.ShardedPrepared(h, h, *small), config),
        "all_in_one": lambda: jax.jit(step, static_argnums=3, donate_argnums=0).lower(total, h_tk, w_kn, config),
    }
    found = {}
    for name, lower in lowered.items():
        start = time.perf_counter()
        memory = lower().compile().memory_analysis()
        sizes = {
            "argument_bytes": memory.argument_size_in_bytes,
            "output_bytes": memory.output_size_in_bytes,
            "output_bytes_in_arguments": memory.alias_size_in_bytes,
            "temp_bytes": memory.temp_size_in_bytes,
        }
        both = (sizes["argument_bytes"] + sizes["temp_bytes"]) / 1e9
        found[name] = {
            **sizes,
            "arguments_and_temps_gb": round(both, 3),
            "with_new_outputs_gb": round(both + (sizes["output_bytes"] - sizes["output_bytes_in_arguments"]) / 1e9, 3),
            "under_limit": both < LIMIT_GB,
            "trace_and_compile_seconds": round(time.perf_counter() - start, 2),
        }
        print(f"data={mesh.shape['data']} model={mesh.shape['model']} {name}: {json.dumps(found[name])}", flush=True)
    return found


def memory() -> dict[str, Any]:
    """All meshes of eight H200s, without one."""
    devices = topology(8).devices
    return {
        f"data={data} model={model}": compiled_for(make_mesh(data=data, model=model, devices=devices)) for data, model in MESHES
    }


def solved_codes(path: str, data: int, model: int) -> None:
    """Writes the codes and the loss of a problem with a few strong features, on a mesh or, if that is 0 x 0, without one."""
    random = np.random.default_rng(0)
    strong = random.normal(size=(CODES_K, CODES_K)) * random.lognormal(size=CODES_K) * 0.1
    h_tk = jnp.asarray(random.normal(size=(CODES_T, CODES_K)) @ strong, jnp.float32)
    w_kn = jnp.asarray(random.normal(size=(CODES_K, CODES_N)) * 0.05, jnp.float32)
    if data:
        config = QuantizeConfig()
        _, found = step(slabs.empty(CODES_K, make_mesh(data=data, model=model)), h_tk, w_kn, config)
    else:
        found = solve(w_kn, dense.hessian(dense.accumulate(dense.empty(CODES_K), h_tk)), QuantizeConfig())
    np.savez(path, codes=found.codes_kn, loss=np.asarray(found.loss_n).astype(np.float64).sum())


def codes() -> dict[str, Any]:
    """Eight forced CPU devices against one."""
    with tempfile.TemporaryDirectory() as scratch:

        def run(data: int, model: int) -> Any:
            path = f"{scratch}/{data}x{model}.npz"
            flags = f"--xla_force_host_platform_device_count={max(1, data * model)}"
            environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(Path(__file__).parent.parent)}
            subprocess.run([sys.executable, __file__, path, str(data), str(model)], check=True, env=environment)
            return np.load(path)

        one = run(0, 0)
        found = {}
        for data, model in ((8, 1), (2, 4)):
            eight = run(data, model)
            found[f"data={data} model={model}"] = {
                "codes": int(one["codes"].size),
                "codes_that_differ": int(np.sum(one["codes"] != eight["codes"])),
                "relative_difference_of_loss": float(eight["loss"] / one["loss"] - 1),
            }
    print(json.dumps(found, indent=1))
    return found


def main() -> None:
    result = {
        **circumstances(),
        "compiled_for": "eight NVIDIA H200 of one host, by their description; none was there",
        "job": {"k": K, "n": N, "tokens": TOKENS, "activations": "bfloat16", "hessian_gb": K * K * 4 / 1e9, "limit_gb": LIMIT_GB},
        "memory_of_a_device": memory(),
        "codes_of_eight_cpu_devices": {"k": CODES_K, "n": CODES_N, "tokens": CODES_T, **codes()},
    }
    print("wrote", write_result("mesh_h200", result))


if __name__ == "__main__":
    if len(sys.argv) == 4:
        solved_codes(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
