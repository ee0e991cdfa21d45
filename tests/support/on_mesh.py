"""Run by test_sharded.py in a process of its own, on eight forced CPU devices: writes what it finds as arrays by name.

python on_mesh.py OUT.npz
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from jgptq.settings.run import QuantizeConfig
from jgptq.solver import Solution
from jgptq.solver.mesh import cholesky as slab_cholesky
from jgptq.solver.mesh import sharded, slabs
from jgptq.solver.mesh.axes import by_columns, by_tokens, make_mesh
from jgptq.solver.sequence import row_sequence

MESHES = ((8, 1), (2, 4), (1, 8), (4, 2))
K, N, T = 320, 44, 603  # none is a multiple of eight panels, columns or tokens
CONFIGS = {
    "8x1": {"group_size": 64},
    "2x4": {"group_size": -1, "sym": False, "order": "none", "bits": 3},
    "1x8": {"group_size": 32, "order": "desc_act"},
    "4x2": {"group_size": 64, "order": "static", "scale": "mse"},
}
FAILURES = {
    "zero": np.zeros((64, 64)),
    "nan": np.diag(np.r_[np.ones(63), np.nan]),
    "negative": -np.eye(64) * 1e6 + np.diag(np.r_[1.0, np.zeros(63)]) * 2e6,
}


def problem() -> tuple[np.ndarray, np.ndarray]:
    """Activations of a few strong features, two of them dead, and weights."""
    random = np.random.default_rng(0)
    h_tk = random.normal(size=(T, K)) @ (random.normal(size=(K, K)) * random.lognormal(size=K) * 0.1)
    h_tk[:, [3, 100]] = 0
    return h_tk.astype(np.float32), (random.normal(size=(K, N)) * 0.05).astype(np.float32)


def indefinite() -> np.ndarray:
    """A Hessian with an eigenvalue below zero: no damping of 0.001 helps, one of 0.01 does."""
    h_kk = np.diag(np.r_[np.ones(63), 1e-3]).astype(np.float32)
    h_kk[62, 63] = h_kk[63, 62] = 0.1
    return h_kk


def in_slabs(h_kk: np.ndarray, mesh: jax.sharding.Mesh) -> slabs.Slabs:
    k = len(h_kk)
    pad = slabs.padded_size(k, mesh) - k
    values = np.pad(h_kk.astype(np.float32), ((0, pad), (0, pad)))
    return slabs.Slabs(jax.device_put(values, by_columns(mesh)), k, mesh)


def fields(name: str, solution: Solution) -> dict[str, np.ndarray]:
    return {f"{name}/{field}": np.asarray(value) for field, value in solution._asdict().items() if value is not None}


def solves() -> dict[str, np.ndarray]:
    """The same problem from activations to codes, each mesh with settings of its own."""
    found: dict[str, np.ndarray] = {}
    h_tk, w_kn = problem()
    for data, model in MESHES:
        name = f"{data}x{model}"
        mesh, config = make_mesh(data=data, model=model), QuantizeConfig(**CONFIGS[name])
        total = slabs.empty(K, mesh)
        for batch in (h_tk[:200].reshape(8, 25, K), h_tk[200:]):
            total = slabs.accumulate(total, jnp.asarray(batch))
        found[f"{name}/tokens"] = np.asarray(total.tokens)
        prepared = sharded.prepare(slabs.hessian(total), config)
        found |= {f"{name}/h": np.asarray(prepared.h.values), f"{name}/factor": np.asarray(prepared.factor.values)}
        found[f"{name}/shard"] = np.asarray(prepared.factor.values.addressable_shards[0].data.shape)
        found |= fields(name, sharded.solve_columns(jnp.asarray(w_kn), prepared, config))
    return found


def troubles() -> dict[str, np.ndarray]:
    """What ends otherwise than solved; all on one mesh, in the programs of one shape."""
    mesh, config = make_mesh(data=2, model=4), QuantizeConfig(group_size=32, damping=0.001)
    found: dict[str, np.ndarray] = {}
    w_kn = np.ones((64, 32), np.float32)
    raised = sharded.prepare(in_slabs(indefinite(), mesh), config)
    found |= {"raised/factor": np.asarray(raised.factor.values)} | fields(
        "raised", sharded.solve_columns(jnp.asarray(w_kn), raised, config)
    )
    for name, h_kk in FAILURES.items():
        found[f"{name}/outcome"] = np.asarray(sharded.prepare(in_slabs(h_kk, mesh), config).outcome)
    for name, weight in (("nonfinite", np.inf), ("overflow", 1e7)):
        spoiled_kn = w_kn.copy()
        spoiled_kn[:, 5] = weight  # one column, so that one device sees it
        found |= fields(name, sharded.solve_columns(jnp.asarray(spoiled_kn), raised, config))
    rtn = QuantizeConfig(group_size=32, method="rtn")
    found |= fields("rtn", sharded.solve_columns(jnp.asarray(w_kn), sharded.prepare(in_slabs(indefinite(), mesh), rtn), rtn))
    return found


def uneven_tiles() -> dict[str, np.ndarray]:
    """A factor whose rows are not a multiple of the tiles in which they are updated."""
    slab_cholesky._MAX_TILE = 384  # the second tile begins within the first, from row 256
    h_tk = np.random.default_rng(4).normal(size=(1500, 640))
    h_kk = (h_tk.T @ h_tk / 1500).astype(np.float32)
    prepared = sharded.prepare(in_slabs(h_kk, make_mesh(data=4, model=2)), QuantizeConfig(order="none"))
    slab_cholesky._MAX_TILE = 2048
    return {"tiles/h": h_kk, "tiles/factor": np.asarray(prepared.factor.values)}


def programs() -> dict[str, np.ndarray]:
    """Of each program at two sizes of K: bytes on a device, whether an array there is all of K x K, length of its text."""
    mesh, config = make_mesh(data=8), QuantizeConfig()
    found: dict[str, np.ndarray] = {}
    for k in (2048, 4096):
        matrix = jax.ShapeDtypeStruct((k, k), jnp.float32, sharding=by_columns(mesh))
        h = slabs.Slabs(matrix, k, mesh)  # type: ignore[arg-type]
        total = slabs.SlabSum(h, jnp.int32(0))
        h_tk = jax.ShapeDtypeStruct((64, k), jnp.bfloat16, sharding=by_tokens(mesh))
        w_kn = jax.ShapeDtypeStruct((k, 256), jnp.float32, sharding=by_columns(mesh))
        order, u_cbb = row_sequence("none", jnp.ones(k), 128), jnp.ones((k // 128, 128, 128))
        prepared = sharded.ShardedPrepared(h, h, u_cbb, order, jnp.ones(k), jnp.float32(0.01), jnp.int32(0))
        for name, lowered in {
            "accumulate": slabs.accumulate.lower(total, h_tk),
            "factor": sharded.factored.lower(h, config),
            "solve": sharded.solve_columns.lower(w_kn, prepared, config),
        }.items():
            compiled = lowered.compile()
            memory = compiled.memory_analysis()
            held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
            found[f"{name}/{k}/slabs"] = np.asarray((held - memory.alias_size_in_bytes) / (k * k * 4 / 8))
            found[f"{name}/{k}/whole"] = np.asarray(f"[{k},{k}]" in compiled.as_text())
            found[f"{name}/{k}/text"] = np.asarray(len(lowered.as_text()))
    return found


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    assert jax.device_count() == 8
    np.savez(sys.argv[1], **solves(), **troubles(), **uneven_tiles(), **programs())
