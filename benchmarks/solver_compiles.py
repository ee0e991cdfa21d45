"""What a solve takes to compile, for `bench_solver.py`, and that a second matrix of a shape compiles nothing."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from solver_problem import Problem, plain_config, random_hessian, random_weights, solve_tiles, timed

from jgptq.run.tiles import tile_columns
from jgptq.settings.run import QuantizeConfig
from jgptq.solver import prepare, solve_columns

COMPILE_LIMIT = 10.0
COMPILED = "/jax/core/compile/backend_compile_duration"
COMPILE_SHAPES = {(256, 256): 128, (2080, 2080): 32, (4096, 4096): 128, (14336, 4096): 128}  # (K, N): group size
SECOND_SOLVED = 4096  # the largest K whose second matrix is solved for the count of compilations; `square`, `wide` count theirs


class Compilations:
    """Counts compilations of this process while it is entered."""

    def __enter__(self) -> "Compilations":
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._saw)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._saw)

    def _saw(self, event: str, _: float, **__: Any) -> None:
        self.count += event == COMPILED


def compile_times(shapes: dict[tuple[int, int], int]) -> list[dict[str, Any]]:
    """Tracing and compiling of both programs for each shape, with empty caches; then two matrices, of which one may compile."""
    entries = []
    for (k, n), group in shapes.items():
        config = plain_config(group)
        columns = tile_columns((n,))
        jax.clear_caches()
        h_kk, w_kn = jax.ShapeDtypeStruct((k, k), jnp.float32), jax.ShapeDtypeStruct((k, columns), jnp.float32)
        first = timed(lambda h=h_kk, c=config: jax.jit(prepare, static_argnums=1).lower(h, c).compile())
        prepared = jax.eval_shape(lambda h, c=config: prepare(h, c), h_kk)
        solve = jax.jit(solve_columns, static_argnums=2)
        second = timed(lambda w=w_kn, p=prepared, c=config, s=solve: s.lower(w, p, c).compile())
        entry = {"k": k, "n": n, "group_size": group, "prepare": first.seconds, "solve_columns": second.seconds}
        entry["seconds"] = first.seconds + second.seconds
        if k <= SECOND_SOLVED:
            entry |= _compilations_of_two(k, n, config)
        print("compile", {name: round(value, 2) for name, value in entry.items()}, flush=True)
        entries.append(entry)
    return entries


def _compilations_of_two(k: int, n: int, config: QuantizeConfig) -> dict[str, int]:
    """Compilations that the first and the second matrix of a shape need, Hessian and weights being new."""
    jax.clear_caches()
    counts = []
    for seed in (1, 2):
        problem = Problem(random_hessian(k) * np.float32(seed), random_weights(k, n, seed))
        with Compilations() as seen:
            h_kk, w_kn = jnp.asarray(problem.h_kk), jnp.asarray(problem.w_kn)
            jax.block_until_ready(solve_tiles(w_kn, prepare(h_kk, config), config))
        counts.append(seen.count)
    assert counts[0] > 0, "compilations are not counted: this version of JAX names the event otherwise"
    assert counts[1] == 0, f"a second matrix compiled {counts[1]} programs"
    return {"compiled_by_first": counts[0], "compiled_by_second": counts[1]}
