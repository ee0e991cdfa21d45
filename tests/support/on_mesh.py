"""Run by test_mesh.py in a process of its own, on eight forced CPU devices: writes its results as arrays by name.

python on_mesh.py OUT.npz
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jgptq.run.tiles import SolvedStage, prepare_program, prepare_stage, solve_stage
from jgptq.settings.presets import make_config
from jgptq.settings.run import QuantizeConfig
from jgptq.solver import Means, Placement, Prepared, Solution, judge_columns, prepare, solve_columns
from jgptq.solver.codes.sequence import row_sequence
from jgptq.solver.mesh import OnMesh, make_mesh, slabs
from jgptq.solver.mesh import cholesky as slab_cholesky
from jgptq.solver.mesh.axes import by_columns, by_tokens
from jgptq.solver.statistics.drift import StageSums

K, N, T = 320, 44, 603  # none is a multiple of eight panels, columns or tokens
WIDE = {"group_size": -1, "sym": False, "bits": 3}
CASES: dict[str, list[dict[str, Any]]] = {
    "8x1": [
        {"preset": "balanced"},
        {"preset": "best"},
        {"method": "gptaq", "order": "static", "scale": "mse"},
        {"method": "qronos", "order": "desc_act"},
    ],
    "4x2": [
        {"preset": "fast", "order": "none"},
        {"preset": "best", "order": "desc_act", "float64": True, **WIDE},
        {"method": "gptaq"},
    ],
    "2x4": [
        {"preset": "balanced", "order": "static", "refit": True},
        {"method": "qronos", "order": "none", **WIDE},
    ],
    "1x8": [{"method": "rtn"}],
}
"""By mesh, data x model: settings in addition to a group size of 64."""
FAILURES = {
    "zero": np.zeros((64, 64)),
    "nan": np.diag(np.r_[np.ones(63), np.nan]),
    "negative": -np.eye(64) * 1e6 + np.diag(np.r_[1.0, np.zeros(63)]) * 2e6,
}


def config_of(case: dict[str, Any]) -> QuantizeConfig:
    return make_config({"group_size": 64} | case)


def name_of(mesh: str, case: dict[str, Any]) -> str:
    return f"{mesh} {' '.join(f'{name}={value}' for name, value in case.items())}"


def problem() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Activations of a few strong features, two of them dead; the float model's; what the residual stream lost; and weights."""
    random = np.random.default_rng(0)
    h_tk = random.normal(size=(T, K)) @ (random.normal(size=(K, K)) * random.lognormal(size=K) * 0.1)
    h_tk[:, [3, 100]] = 0
    float_tk = h_tk + random.normal(size=(T, K)) @ random.normal(size=(K, K)) * 0.02 - 0.05 * h_tk
    arrays = h_tk, float_tk, random.normal(size=(T, N)) * 0.1, random.normal(size=(K, N)) * 0.05
    return tuple(part.astype(np.float32) for part in arrays)  # type: ignore[return-value]


def summed(placement: Placement) -> StageSums:
    """Batches of more than one axis."""
    parts = [jnp.asarray(part.reshape(3, 3, T // 9, -1)) for part in problem()[:3]]
    total = placement.empty_sums(K, N, drift=True)
    add = jax.jit(placement.accumulate, donate_argnums=0)
    for index in range(3):
        total = add(total, *(part[index] for part in parts))
    return total


def solved(placement: Placement, means: Means, case: dict[str, Any]) -> tuple[Prepared, Solution]:
    """One case, from the means of its sums to codes."""
    config = config_of(case)
    with jax.enable_x64(config.float64):
        prepared = prepare(means.h_kk, config, means.drift_kk, placement=placement)
        return prepared, judge_columns(jnp.asarray(problem()[3]), prepared, config, means.residual_kn)


def fields(name: str, solution: Solution) -> dict[str, np.ndarray]:
    return {f"{name}/{field}": np.asarray(value) for field, value in solution._asdict().items() if value is not None}


def solves() -> dict[str, np.ndarray]:
    """The same problem from activations to codes, each mesh with settings of its own."""
    results: dict[str, np.ndarray] = {}
    for mesh, cases in CASES.items():
        data, model = map(int, mesh.split("x"))
        placement = OnMesh(make_mesh(data=data, model=model))
        total = summed(placement)
        results[f"{mesh}/tokens"] = np.asarray(total.hessian.tokens)
        means = jax.jit(placement.means)(total)
        results |= {f"{mesh}/h": np.asarray(means.h_kk.values), f"{mesh}/drift": np.asarray(means.drift_kk.values)}
        results[f"{mesh}/residual"] = np.asarray(means.residual_kn)
        for case in cases:
            prepared, solution = solved(placement, means, case)
            results |= fields(name_of(mesh, case), solution)
            if prepared.factor is not None:
                results[f"{name_of(mesh, case)}/factor"] = np.asarray(prepared.factor.values)
                results[f"{name_of(mesh, case)}/shard"] = np.asarray(prepared.factor.values.addressable_shards[0].data.shape)
    return results


def stages() -> dict[str, np.ndarray]:
    """Two linears of a stage as tiles, of which the last overlaps the one before."""
    result = stage_of(OnMesh(make_mesh(data=4, model=2)))
    codes = {f"stage/{index}/codes": np.asarray(linear.packed.qweight) for index, linear in enumerate(result.linears)}
    return codes | {f"stage/{index}/loss": np.asarray(linear.loss_n) for index, linear in enumerate(result.linears)}


def stage_of(placement: Placement) -> SolvedStage:
    config = make_config({"preset": "fast", "group_size": 64, "scale": "minmax"})
    kernels = tuple(jnp.asarray(np.tile(problem()[3], (1, 2))[:, :n]) for n in (64, 32))
    prepared = prepare_stage(summed(placement)._replace(drift=None), config, placement)
    return solve_stage(kernels, prepared, config, columns=64, dtype=jnp.dtype(jnp.float32))


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


def troubles() -> dict[str, np.ndarray]:
    """What ends otherwise than solved; all on one mesh, in the programs of one shape."""
    placement, config = OnMesh(make_mesh(data=2, model=4)), QuantizeConfig(group_size=32, damping=0.001)
    results: dict[str, np.ndarray] = {}
    w_kn = np.ones((64, 32), np.float32)

    def prepared(h_kk: np.ndarray, drift_kk: np.ndarray | None = None) -> Prepared:
        given = [None if part is None else in_slabs(part, placement.mesh) for part in (h_kk, drift_kk)]
        return prepare(given[0], config, given[1], placement=placement)

    raised = prepared(indefinite())
    results["raised/factor"] = np.asarray(raised.factor.values)
    results |= fields("raised", solve_columns(jnp.asarray(w_kn), raised, config))
    for name, h_kk in FAILURES.items():
        results[f"{name}/outcome"] = np.asarray(prepared(h_kk).outcome)
    results["nan drift/outcome"] = np.asarray(prepared(indefinite(), FAILURES["nan"]).outcome)
    for name, weight in (("nonfinite", np.inf), ("overflow", 1e7)):
        spoiled_kn = w_kn.copy()
        spoiled_kn[:, 5] = weight  # one column, so that one device sees it
        results |= fields(name, solve_columns(jnp.asarray(spoiled_kn), raised, config))
    return results


def uneven_tiles() -> dict[str, np.ndarray]:
    """A factor whose rows are not a multiple of the tiles in which they are updated."""
    slab_cholesky._MAX_TILE = 384  # the second tile begins within the first, from row 256
    h_tk = np.random.default_rng(4).normal(size=(1500, 640))
    h_kk = (h_tk.T @ h_tk / 1500).astype(np.float32)
    placement = OnMesh(make_mesh(data=4, model=2))
    prepared = prepare(in_slabs(h_kk, placement.mesh), QuantizeConfig(order="none"), placement=placement)
    slab_cholesky._MAX_TILE = 2048
    return {"tiles/h": h_kk, "tiles/factor": np.asarray(prepared.factor.values)}


PROGRAMS = {"solve": {}, "solve gptaq": {"method": "gptaq"}, "solve qronos": {"method": "qronos"}, "solve best": {"refine": 3}}
"""Settings of each solve whose memory is looked at."""


def programs() -> dict[str, np.ndarray]:
    """Of each program at two sizes of K: bytes on a device, whether an array there is all of K x K, length of its text."""
    mesh, config = make_mesh(data=8), QuantizeConfig()
    placement = OnMesh(mesh)
    results: dict[str, np.ndarray] = {}
    for k in (2048, 4096):
        matrix = jax.ShapeDtypeStruct((k, k), jnp.float32, sharding=by_columns(mesh))
        narrow = jax.ShapeDtypeStruct((k, 256), jnp.float32, sharding=by_columns(mesh))
        h = slabs.Slabs(matrix, k, mesh)  # type: ignore[arg-type]
        drift = slabs.SlabDriftSum(h, narrow, jnp.int32(0), k, 256, mesh)  # type: ignore[arg-type]
        tokens = [jax.ShapeDtypeStruct((64, wide), jnp.bfloat16, sharding=by_tokens(mesh)) for wide in (k, k, 256)]
        prepared = Prepared(
            h_kk=h,
            factor=h,
            u_cbb=jnp.ones((k // 128, 128, 128)),
            drift_kk=h,
            sequence=row_sequence("group", jnp.ones(k), 128),
            damping=jnp.float32(0.01),
            outcome=jnp.int32(0),
            placement=placement,
        )
        lowered = {
            "accumulate": slabs.accumulate.lower(slabs.SlabSum(h, jnp.int32(0)), tokens[0]),
            "accumulate drift": slabs.accumulate_drift.lower(drift, *tokens),
            "prepare": prepare_program(placement).lower(
                StageSums(slabs.SlabSum(h, jnp.int32(0)), drift.without_residual()), config.solver, placement, pulled=False
            ),
            "factor": jax.jit(lambda h, drift: factored(h, drift, config, placement)).lower(h, h),
        }
        for name, settings in PROGRAMS.items():
            solve = jax.jit(judge_columns, static_argnums=2)
            lowered[name] = solve.lower(narrow, prepared, QuantizeConfig(**settings), narrow)  # type: ignore[arg-type]
        for name, program in lowered.items():
            results[f"{name}/{k}/text"] = np.asarray(len(program.as_text()))
            if name in PROGRAMS and k == 2048:
                continue
            compiled = program.compile()
            memory = compiled.memory_analysis()
            held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
            results[f"{name}/{k}/slabs"] = np.asarray((held - memory.alias_size_in_bytes) / (k * k * 4 / 8))
            results[f"{name}/{k}/whole"] = np.asarray(f"[{k},{k}]" in compiled.as_text())
    return results


def factored(h: Any, drift: Any, config: QuantizeConfig, placement: Placement) -> tuple[Any, jax.Array]:
    """What `prepare` computes; the Hessian itself would be copied on its way out of a program."""
    prepared = prepare(h, config, drift, placement=placement)
    return prepared.factor, prepared.outcome


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    assert jax.device_count() == 8
    np.savez(sys.argv[1], **solves(), **stages(), **troubles(), **uneven_tiles(), **programs())
