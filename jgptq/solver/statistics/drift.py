"""Sums over tokens of how far the quantized model has drifted from the float one, next to the Hessian of the same inputs."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jgptq.notation import Float, Int
from jgptq.solver.checks import checked_batch


class DriftSum(NamedTuple):
    """Running sums of `x (x_f - x)^T` and of `x d^T`.

    x is what a linear reads, x_f the same in the float model, d the float residual stream less the quantized one, where the
    linear's output is added to it.
    """

    inputs_kk: Float[jax.Array, "K K"] | None  # float32; None where d holds what the drift of x does to the linear's output
    residual_kd: Float[jax.Array, "K D"] | None  # float32; None for a linear that does not add to the stream
    tokens: Int[jax.Array, ""]

    def without_residual(self) -> "DriftSum":
        """The sum over inputs alone."""
        return self._replace(residual_kd=None)


class StageSums(NamedTuple):
    """What is summed over the tokens that linears read, in the form of a placement: on one device these, in slabs on a mesh."""

    hessian: Any  # a HessianSum
    drift: Any  # a DriftSum; None where no solve looks at the float model

    def without_residual(self) -> "StageSums":
        """The sums that all linears have: what a Hessian is prepared from."""
        return self if self.drift is None else self._replace(drift=self.drift.without_residual())


def empty_drift(k: int, width: int | None, *, inputs: bool = True) -> DriftSum:
    """The sums over no tokens, for a linear that adds to a stream of `width`, or to none; of the inputs only where asked."""
    inputs_kk = jnp.zeros((k, k), jnp.float32) if inputs else None
    residual_kd = None if width is None else jnp.zeros((k, width), jnp.float32)
    return DriftSum(inputs_kk, residual_kd, jnp.zeros((), jnp.int32))


def accumulate_drift(
    total: DriftSum,
    h: Float[jax.Array, "*batch K"],
    h_float: Float[jax.Array, "*batch K"] | None,
    lost: Float[jax.Array, "*batch D"] | None,
) -> DriftSum:
    """Adds a batch; the differences are taken in float32 and multiplied in the dtype of `h`, accumulated in float32.

    Args:
      total: the sums so far.
      h: activations `[..., K]` of the quantized model.
      h_float: the same of the float model.
      lost: the float residual stream less the quantized one, `[..., D]`, float32; not read where the linear adds to none.

    Returns:
      The new sums.

    Raises:
      ConfigError: K is not that of the sums, or what they are sums of is missing.
    """
    k = h.shape[-1] if total.inputs_kk is None else total.inputs_kk.shape[0]
    checked_batch(h, h_float, lost, k=k, inputs=total.inputs_kk is not None, residual=total.residual_kd is not None)
    # Tokens last in both operands, as in the Hessian's sum.
    h_kt = jax.lax.optimization_barrier(h.reshape(-1, k).T)
    inputs_kk, residual_kd = total.inputs_kk, total.residual_kd
    if residual_kd is not None and lost is not None:
        lost_dt = jax.lax.optimization_barrier(lost.astype(h.dtype).reshape(-1, lost.shape[-1]).T)
        residual_kd = residual_kd + _outer(h_kt, lost_dt)
    if inputs_kk is not None and h_float is not None:
        off = (h_float.astype(jnp.float32) - h.astype(jnp.float32)).astype(h.dtype)
        inputs_kk = inputs_kk + _outer(h_kt, jax.lax.optimization_barrier(off.reshape(-1, k).T))
    return DriftSum(inputs_kk, residual_kd, total.tokens + h_kt.shape[1])


def mean_drift(total: DriftSum) -> tuple[Float[jax.Array, "K K"] | None, Float[jax.Array, "K D"] | None]:
    """`2/T` times the sums: C and R of `jgptq.solver.codes.target`, on the scale of the Hessian."""
    factor = 2.0 / jnp.maximum(total.tokens, 1).astype(jnp.float32)
    inputs_kk, residual_kd = (None if part is None else part * factor for part in (total.inputs_kk, total.residual_kd))
    return inputs_kk, residual_kd


def _outer(a_pt: jax.Array, b_qt: jax.Array) -> jax.Array:
    contract_tokens = (((1,), (1,)), ((), ()))
    highest = jax.lax.Precision.HIGHEST
    return jax.lax.dot_general(a_pt, b_qt, contract_tokens, precision=highest, preferred_element_type=jnp.float32)
