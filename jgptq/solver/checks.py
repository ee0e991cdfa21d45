"""Checks of what a solve is given, and its diagnosis after the factorization."""

import jax
import jax.numpy as jnp

from jgptq.errors import ConfigError
from jgptq.notation import Bool, Float, Int
from jgptq.solver.outcome import Outcome


def check_k(name: str, k: int, expected: int, owner: str) -> None:
    """Refuses an array whose number of in-features differs from that of the array it is combined with.

    Args:
      name: what is refused.
      k: its K.
      expected: the K that it should have.
      owner: what has that K.

    Raises:
      ConfigError: they differ.
    """
    if k != expected:
        raise ConfigError(
            f"expected {name} of K={expected} in-features, as {owner} has, found K={k}; give both for the same linear"
        )


def checked_batch(
    h: jax.Array, h_float: jax.Array | None, lost: jax.Array | None, *, k: int, inputs: bool, residual: bool
) -> None:
    """Refuses a batch that lacks a part whose drift is summed.

    Args:
      h: activations `[..., K]` of the quantized model.
      h_float: the same of the float model.
      lost: what the residual stream lost, `[..., D]`.
      k: K of the sums.
      inputs: whether the drift of the inputs is summed.
      residual: whether `lost` is summed.

    Raises:
      ConfigError: K is not that of the sums, or a part is missing.
    """
    if (inputs and h_float is None) or (residual and lost is None):
        missing = "h_float" if inputs and h_float is None else "lost"
        raise ConfigError(
            f"expected {missing} next to the activations whose drift is summed, found None; give it with each batch"
        )
    check_k("activations", h.shape[-1], k, "the drift's sum")
    if inputs and h_float is not None:
        check_k("float activations", h_float.shape[-1], k, "the drift's sum")


def solver_dtype(float64: bool) -> jnp.dtype:
    """What a solve computes in.

    Raises:
      ConfigError: float64 is asked for where jax computes in float32 alone.
    """
    if not float64:
        return jnp.dtype(jnp.float32)
    if not jax.config.read("jax_enable_x64"):
        raise ConfigError("float64 needs jax's double precision: solve within `with jax.enable_x64(True)`")
    return jnp.dtype(jnp.float64)


def factor_outcome(
    raised: Bool[jax.Array, ""],
    factored: Bool[jax.Array, ""],
    diag_k: Float[jax.Array, " K"],
    *,
    finite: Bool[jax.Array, ""],
    symmetric: Bool[jax.Array, ""],
) -> Int[jax.Array, ""]:
    """The `Outcome` of a factorization.

    Args:
      raised: whether it took more damping than was asked for.
      factored: whether the factor is finite.
      diag_k: the Hessian's diagonal.
      finite: whether all that was given is finite.
      symmetric: whether the Hessian is.
    """
    outcome = jnp.where(raised, Outcome.RAISED_DAMPING, Outcome.SOLVED)
    outcome = jnp.where(factored, outcome, Outcome.NOT_FACTORED)
    outcome = jnp.where(jnp.any(diag_k != 0), outcome, Outcome.ZERO_HESSIAN)
    outcome = jnp.where(symmetric & jnp.all(diag_k >= 0), outcome, Outcome.NOT_A_HESSIAN)
    return jnp.where(finite, outcome, Outcome.NONFINITE_HESSIAN)
