"""One linear on eight devices: what a device holds at the largest size, compiled for GPUs that need not be there, and the codes.

    make .aot/ready
    PYTHONPATH=.:.aot .venv/bin/python benchmarks/bench_mesh.py [--only memory codes]

`memory`: the down projection of a 405B Llama (K = 53248, N = 16384; its Hessian is 11.3 GB, the drift of its inputs as large)
for eight H200s of one host, by the default preset, which follows the float model: the sums over a batch of 8 x 4096 tokens in
bfloat16, the factorization (alone, and of the sums as the driver calls it), the solve, and all of them as one program. Bytes are
of one device, as XLA's buffer assignment has them after compiling for the topology; no GPU runs, and none is needed. The two
packages hold the compiler alone (`--no-deps`: no CUDA library comes along), in a folder of their own so that other programs do
not look for a GPU. Workspaces that cuSOLVER takes when it runs are not in these figures; for a panel of 128 rows they are below a
megabyte.

`codes`: the codes of eight forced CPU devices against those of one, for every preset, method and order: how many differ, of all.
"""

import argparse
import itertools
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
    # The compiler for the topology needs no GPU: arrays are on the CPU in every process of this script.
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from aot import topology
from common import circumstances, write_result
from jax.sharding import Mesh, NamedSharding

from jgptq.run.tiles import prepare_program
from jgptq.settings.presets import make_config
from jgptq.settings.run import QuantizeConfig
from jgptq.solver import ONE_DEVICE, Means, Placement, Prepared, Solution, judge_columns, prepare
from jgptq.solver.codes.compensate import solver_block
from jgptq.solver.codes.sequence import row_sequence
from jgptq.solver.mesh import OnMesh, make_mesh, slabs
from jgptq.solver.mesh.axes import by_columns, by_tokens, replicated
from jgptq.solver.statistics.drift import StageSums

K, N, TOKENS = 53248, 16384, 8 * 4096
LIMIT_GB = 8.0
MESHES = ((8, 1), (4, 2), (2, 4))
CODES_K, CODES_N, CODES_T, CODES_GROUP = 512, 128, 2048, 128
ORDERS = ("none", "group", "static", "desc_act")
CODES: tuple[dict[str, Any], ...] = (
    *({"preset": preset, "order": order} for preset, order in itertools.product(("fast", "balanced", "best"), ORDERS)),
    *({"method": method, "order": order} for method, order in itertools.product(("gptaq", "qronos"), ORDERS)),
    {"method": "rtn"},
)


class Abstract:
    """Operands of the largest linear, without their values."""

    def __init__(self, mesh: Mesh, config: QuantizeConfig) -> None:
        self.placement = OnMesh(mesh)
        self.h_kk = self._matrix(mesh)
        tokens = abstract((), jnp.int32, replicated(mesh))
        rows = self.h_kk.values.shape[0]
        drift = slabs.SlabDriftSum(self._matrix(mesh), abstract((rows, N), jnp.float32, by_columns(mesh)), tokens, K, N, mesh)
        self.total = StageSums(slabs.SlabSum(self.h_kk, tokens), drift)
        wide, narrow = (abstract((TOKENS, size), jnp.bfloat16, by_tokens(mesh)) for size in (K, N))
        self.batch = wide, wide, narrow
        self.w_kn = abstract((K, N), jnp.float32, by_columns(mesh))
        block = solver_block(K, config.group_size)
        self.prepared = Prepared(
            h_kk=self.h_kk,
            factor=self._matrix(mesh),
            u_cbb=abstract((K // block, block, block), jnp.float32, replicated(mesh)),
            drift_kk=self._matrix(mesh),
            sequence=jax.tree.map(
                lambda leaf: abstract(leaf.shape, leaf.dtype, replicated(mesh)),
                jax.eval_shape(lambda diag_k: row_sequence(config.order, diag_k, config.group_size), jnp.zeros(K)),
            ),
            damping=abstract((), jnp.float32, replicated(mesh)),
            outcome=tokens,
            placement=self.placement,
        )

    def _matrix(self, mesh: Mesh) -> Any:
        size = slabs.padded_size(K, mesh)
        return slabs.Slabs(abstract((size, size), jnp.float32, by_columns(mesh)), K, mesh)


def abstract(shape: tuple[int, ...], dtype: Any, where: NamedSharding) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)


def factored(h_kk: Any, drift_kk: Any, config: QuantizeConfig, placement: Placement) -> tuple[Any, ...]:
    """What `prepare` computes; the Hessian and the drift themselves would be copied on their way out of a program."""
    prepared = prepare(h_kk, config, drift_kk, placement=placement)
    return prepared.factor, prepared.u_cbb, prepared.sequence, prepared.damping, prepared.outcome


def step(
    total: StageSums, batch: tuple[Any, ...], w_kn: jax.Array, config: QuantizeConfig, placement: Placement
) -> tuple[Means, Solution]:
    """A whole linear, from activations to codes; the means are returned too, so that they may stay in the memory of the sums."""
    means = placement.means(placement.accumulate(total, *batch))
    prepared = prepare(means.h_kk, config, means.drift_kk, placement=placement)
    return means, judge_columns(w_kn, prepared, config, means.residual_kn)


def compiled_for(mesh: Mesh) -> dict[str, Any]:
    """Bytes and seconds of each program on this mesh."""
    config = QuantizeConfig()
    of = Abstract(mesh, config)
    placement = of.placement
    accumulate = jax.jit(placement.accumulate, donate_argnums=0)
    lowered = {
        "accumulate": lambda: accumulate.lower(of.total, *of.batch),
        "prepare": lambda: prepare_program(placement).lower(of.total.without_residual(), config.solver, placement, pulled=False),
        "factor": lambda: jax.jit(lambda h, drift: factored(h, drift, config, placement)).lower(of.h_kk, of.h_kk),
        "solve": lambda: jax.jit(judge_columns, static_argnums=2).lower(of.w_kn, of.prepared, config, of.w_kn),
        "all_in_one": lambda: jax.jit(step, static_argnums=(3, 4), donate_argnums=0).lower(
            of.total, of.batch, of.w_kn, config, placement
        ),
    }
    result = {}
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
        new = (sizes["output_bytes"] - sizes["output_bytes_in_arguments"]) / 1e9
        result[name] = {
            **sizes,
            "arguments_and_temps_gb": round(both, 3),
            "with_new_outputs_gb": round(both + new, 3),
            "under_limit": both + new < LIMIT_GB,
            "trace_and_compile_seconds": round(time.perf_counter() - start, 2),
        }
        print(f"data={mesh.shape['data']} model={mesh.shape['model']} {name}: {json.dumps(result[name])}", flush=True)
    return result


def memory() -> dict[str, Any]:
    """All meshes of eight H200s, without one."""
    devices = topology(8).devices
    return {
        f"data={data} model={model}": compiled_for(make_mesh(data=data, model=model, devices=devices)) for data, model in MESHES
    }


def codes_of_all() -> list[dict[str, Any]]:
    """Every case on one device and on each mesh; run where eight devices are forced."""
    random = np.random.default_rng(0)
    strong = random.normal(size=(CODES_K, CODES_K)) * random.lognormal(size=CODES_K) * 0.1
    h_tk = random.normal(size=(CODES_T, CODES_K)) @ strong
    float_tk = h_tk + random.normal(size=(CODES_T, CODES_K)) @ random.normal(size=(CODES_K, CODES_K)) * 0.02 - 0.05 * h_tk
    batch = [jnp.asarray(part, jnp.float32) for part in (h_tk, float_tk, random.normal(size=(CODES_T, CODES_N)) * 0.1)]
    w_kn = jnp.asarray(random.normal(size=(CODES_K, CODES_N)) * 0.05, jnp.float32)
    placements: dict[str, Placement] = {"one": ONE_DEVICE}
    placements |= {f"{data}x{model}": OnMesh(make_mesh(data=data, model=model)) for data, model in MESHES}
    means = {}
    for name, placement in placements.items():
        total = placement.empty_sums(CODES_K, CODES_N, drift=True)
        means[name] = placement.means(jax.jit(placement.accumulate, donate_argnums=0)(total, *batch))
    rows = []
    for case in CODES:
        config = make_config({"group_size": CODES_GROUP} | case)
        solutions = {}
        for name, placement in placements.items():
            prepared = prepare(means[name].h_kk, config, means[name].drift_kk, placement=placement)
            solutions[name] = jax.device_get(judge_columns(w_kn, prepared, config, means[name].residual_kn))
        one = solutions.pop("one")
        row: dict[str, Any] = {**case}
        for name, solution in solutions.items():
            losses = [part.loss_n.astype(np.float64).sum() for part in (one, solution)]
            row[name] = {
                "codes_that_differ": int(np.sum(one.codes_kn != solution.codes_kn)),
                "scales_that_differ": int(np.sum(one.scale_gn != solution.scale_gn)),
                "relative_difference_of_loss": float(losses[1] / losses[0] - 1),
            }
        print(json.dumps(row), flush=True)
        rows.append(row)
        jax.clear_caches()
    return rows


def codes() -> dict[str, Any]:
    """The table, from a process of its own: the number of devices is fixed when JAX starts."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "rows.json"
        environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
        subprocess.run([sys.executable, __file__, "--codes-to", str(path)], check=True, env=environment)
        rows = json.loads(path.read_text())
    size = {"k": CODES_K, "n": CODES_N, "tokens": CODES_T, "group_size": CODES_GROUP, "codes": CODES_K * CODES_N}
    return {**circumstances(), **size, "meshes": "data x model, of eight forced CPU devices", "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["memory", "codes"], default=["memory", "codes"])
    parser.add_argument("--codes-to", type=Path, help="for the process with eight devices")
    args = parser.parse_args()
    if args.codes_to is not None:
        args.codes_to.write_text(json.dumps(codes_of_all()))
        return
    if "memory" in args.only:
        sums_gb = 2 * K * K * 4 / 1e9
        job = {"k": K, "n": N, "tokens": TOKENS, "activations": "bfloat16", "hessian_and_drift_gb": sums_gb, "limit_gb": LIMIT_GB}
        compiled = {"compiled_for": "eight NVIDIA H200 of one host, by their description; none was there", "job": job}
        print("wrote", write_result("mesh_h200", {**circumstances(), **compiled, "memory_of_a_device": memory()}))
    if "codes" in args.only:
        print("wrote", write_result("mesh_codes_cpu", codes()))


if __name__ == "__main__":
    main()
