"""What a solve is given, examined before and after its factorization."""

import jax
import jax.numpy as jnp

from jgptq.errors import ConfigError
from jgptq.notation import Bool, Float, Int
from jgptq.settings.solver import SolverConfig
from jgptq.solver.linalg.cholesky import Factor
from jgptq.solver.outcome import Outcome


def checked_size(h_kk: jax.Array, drift_kk: jax.Array | None) -> int:
    """K, once the shapes agree.

    Raises:
      ValueError: they do not.
    """
    if h_kk.ndim != 2 or h_kk.shape[0] != h_kk.shape[1]:
        raise ValueError(f"a Hessian must be square, found {list(h_kk.shape)}")
    if drift_kk is not None and drift_kk.shape != h_kk.shape:
        raise ValueError(f"the drift {list(drift_kk.shape)} must have the shape of the Hessian {list(h_kk.shape)}")
    return h_kk.shape[0]


def examined(h_kk: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whether H is finite, and whether it is symmetric: its products with one vector and those of its transpose then agree, and
    for a matrix that is not symmetric they all but never do."""
    k = h_kk.shape[0]
    # All positive, so that features of one sign do not cancel out and leave nothing but rounding.
    probe_k = 1.5 + jnp.cos(jnp.arange(k, dtype=h_kk.dtype) * 1.618)
    left_k, right_k = h_kk @ probe_k, probe_k @ h_kk
    symmetric = jnp.max(jnp.abs(left_k - right_k)) <= 1e-3 * jnp.max(jnp.abs(left_k) + jnp.abs(right_k))
    return jnp.all(jnp.isfinite(left_k)), symmetric


def solver_dtype(config: SolverConfig) -> jnp.dtype:
    """What a solve computes in.

    Raises:
      ConfigError: float64 is asked for where jax computes in float32 alone.
    """
    if not config.float64:
        return jnp.dtype(jnp.float32)
    if not jax.config.read("jax_enable_x64"):
        raise ConfigError("float64 needs jax's double precision: solve within `with jax.enable_x64(True)`")
    return jnp.dtype(jnp.float64)


def factor_outcome(
    factor: Factor,
    diag_k: Float[jax.Array, " K"],
    config: SolverConfig,
    *,
    finite: Bool[jax.Array, ""],
    symmetric: Bool[jax.Array, ""],
) -> Int[jax.Array, ""]:
    """The `Outcome` of a factorization, given the Hessian's diagonal and whether all of it is finite and symmetric."""
    outcome = jnp.where(factor.damping > config.damping, Outcome.RAISED_DAMPING, Outcome.SOLVED)
    outcome = jnp.where(factor.finite, outcome, Outcome.NOT_FACTORED)
    outcome = jnp.where(jnp.any(diag_k != 0), outcome, Outcome.ZERO_HESSIAN)
    outcome = jnp.where(symmetric & jnp.all(diag_k >= 0), outcome, Outcome.NOT_A_HESSIAN)
    return jnp.where(finite, outcome, Outcome.NONFINITE_HESSIAN)
