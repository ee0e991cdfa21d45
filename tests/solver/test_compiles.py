"""How often the solver is compiled, and what its programs need."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from compiling import compilations

from jgptq.settings.rule import Rule
from jgptq.settings.run import QuantizeConfig
from jgptq.settings.solver import SolverConfig
from jgptq.solver import judge_columns, prepare, round_to_nearest, solve, solve_columns, solve_many
from jgptq.solver.linalg.cholesky import damped_factor


def problem(seed: int) -> tuple[jax.Array, jax.Array]:
    """Weights and a Hessian."""
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(300, 192))
    return jnp.asarray(random.normal(size=(192, 40)), jnp.float32), jnp.asarray(inputs.T @ inputs / 150, jnp.float32)


def test_second_matrix_of_a_shape_compiles_nothing():
    config = QuantizeConfig(bits=4, group_size=64, scale="minmax")
    jax.clear_caches()
    with compilations() as first:
        solve(*problem(1), config)
    with compilations() as second:
        solve(*problem(2), dataclasses.replace(config))
    assert first
    assert not second


def test_settings_that_the_solver_does_not_read_compile_nothing():
    w_kn, h_kk = problem(1)
    used = SolverConfig(group_size=64, scale="minmax")
    run = QuantizeConfig(group_size=64, scale="minmax")
    rules = (Rule(pattern="x", bits=3),)
    jax.clear_caches()

    def all_of_them(config: SolverConfig) -> None:
        prepared = prepare(h_kk, config)
        solve_columns(w_kn, prepared, config)
        judge_columns(w_kn, prepared, config)
        round_to_nearest(w_kn, config)
        solve_many(w_kn[None], h_kk[None], config)

    with compilations() as first:
        all_of_them(used)
    with compilations() as second:
        for config in (run, *(dataclasses.replace(run, **{name: value}) for name, value in (("tune", 1.0), ("rules", rules)))):
            all_of_them(config)
        all_of_them(dataclasses.replace(run, allow_rtn_fallback=True, lm_head=True))
    assert first
    assert not second


def test_a_factorization_takes_the_memory_of_two_matrices_and_a_mask():
    """The ordered Hessian, which becomes the factor; one more for a second attempt; and a mask of a byte an entry."""
    k = 512
    operands = jax.ShapeDtypeStruct((k, k), jnp.float32), jax.ShapeDtypeStruct((k,), jnp.int32)
    factored = jax.jit(lambda h_kk, rows_k: damped_factor(h_kk, 0.01, rows_k))
    memory = factored.lower(*operands).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1.5 * 4 * k * k
    h_kk = jnp.eye(k)
    assert prepare(h_kk, QuantizeConfig()).h_kk is h_kk
