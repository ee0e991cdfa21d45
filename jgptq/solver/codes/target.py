"""The target of a linear whose inputs differ from those of the float model's linear."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jgptq.notation import Float


def shifted_target(
    w_kn: Float[jax.Array, "K N"],
    inverse_times: Callable[[jax.Array], jax.Array],
    drift_kn: Float[jax.Array, "K N"] | None,
    residual_kn: Float[jax.Array, "K N"] | None,
    target_shift: float,
    residual_shift: float = 0.0,
) -> Float[jax.Array, "K N"]:
    """The float kernel whose outputs on the quantized inputs are nearest to what they should be.

    With X the inputs that a linear reads, X_f those that the float model's reads, and D what the residual stream lost before this
    linear's output is added to it, `||a (X_f - X) W + b D + X W - X Q||^2` differs from `tr((W' - Q)^T H (W' - Q))` by a constant
    for `W' = W + (H + lambda)^-1 (a C W + b R)`, `C = 2/T X^T (X_f - X)`, `R = 2/T X^T D`. It is least squares, so that every
    solver for Q serves. GPTAQ (arXiv 2504.02692) and Qronos (arXiv 2505.11695) correct the inputs inside of their loops; D as
    well is ours.

    A C W is `2/T X^T X_f W - H W`, and X_f W is what the float model computes in any case: where `2/T X^T (D + a/b X_f W)` is
    summed in place of R, -H W takes the place of C W, and C is never summed.

    Args:
      w_kn: the kernel `[K, N]`.
      inverse_times: `(H + lambda)^-1 B` for a B `[K, N]`.
      drift_kn: C W; None counts as zeros.
      residual_kn: R; None counts as zeros.
      target_shift: a.
      residual_shift: b.

    Returns:
      W'.
    """
    if (drift_kn is None or not target_shift) and (residual_kn is None or not residual_shift):
        return w_kn
    pull_kn = jnp.zeros_like(w_kn)
    if drift_kn is not None and target_shift:
        pull_kn = pull_kn + target_shift * drift_kn
    if residual_kn is not None and residual_shift:
        pull_kn = pull_kn + residual_shift * residual_kn
    return w_kn + inverse_times(pull_kn)
