"""What a linear should output, where what it reads is no longer what the float model's linear reads."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jgptq.notation import Float
from jgptq.solver.linalg import triangular
from jgptq.solver.linalg.triangular import product


def shifted_target(
    w_kn: Float[jax.Array, "K N"],
    inverse_times: Callable[[jax.Array], jax.Array],
    drift_kk: Float[jax.Array, "K K"] | None,
    residual_kn: Float[jax.Array, "K N"] | None,
    target_shift: float,
    residual_shift: float,
) -> Float[jax.Array, "K N"]:
    """The float kernel whose outputs on the quantized inputs are nearest to what they should be.

    With X the inputs that a linear reads, X_f those that the float model's reads, and D what the residual stream lost before this
    linear's output is added to it, `||a (X_f - X) W + b D + X W - X Q||^2` differs from `tr((W' - Q)^T H (W' - Q))` by a constant
    for `W' = W + (H + lambda)^-1 (a C W + b R)`, `C = 2/T X^T (X_f - X)`, `R = 2/T X^T D`. It is least squares, so that every
    solver for Q serves. GPTAQ (arXiv 2504.02692) and Qronos (arXiv 2505.11695) correct the inputs inside of their loops; D as
    well is ours.

    Args:
      w_kn: the kernel `[K, N]`.
      inverse_times: `(H + lambda)^-1 B` for a B `[K, N]`.
      drift_kk: C; None counts as zeros.
      residual_kn: R; None counts as zeros.
      target_shift: a.
      residual_shift: b.

    Returns:
      W'.
    """
    pull_kn = jnp.zeros_like(w_kn)
    if drift_kk is not None and target_shift:
        pull_kn = pull_kn + target_shift * product(drift_kk, w_kn)
    if residual_kn is not None and residual_shift:
        pull_kn = pull_kn + residual_shift * residual_kn
    return w_kn + inverse_times(pull_kn)


def gptaq_drift(l_kk: Float[jax.Array, "K K"], drift_kk: Float[jax.Array, "K K"], alpha: float) -> Float[jax.Array, "K K"]:
    """The matrix P of GPTAQ's loop, by which row k moves the rows after it, `w_j += P[k, j] w_k` (arXiv 2504.02692, eq. 18).

    `P = alpha strictly_upper(strictly_upper((X_f - X)^T X U^T) U)`, with `H^-1 = U^T U`, that is `U = L^-T`.

    Args:
      l_kk: L.
      drift_kk: C = 2/T X^T (X_f - X), rows and columns as in L.
      alpha: the fraction that is corrected.

    Returns:
      P transposed, strictly lower.
    """
    behind_kk = jnp.tril(triangular.transposed_solve(l_kk, drift_kk), -1)
    return alpha * jnp.tril(triangular.solve(l_kk, behind_kk), -1)


def qronos_start(
    w_kn: Float[jax.Array, "K N"],
    target_kn: Float[jax.Array, "K N"],
    l_kk: Float[jax.Array, "K K"],
    h_kk: Float[jax.Array, "K K"],
    drift_kk: Float[jax.Array, "K K"],
    alpha: float,
) -> Float[jax.Array, "K N"]:
    """Where Qronos' loop begins (arXiv 2505.11695, algorithm 1 in the form of its theorem on GPTQ-like updates).

    Its first code is chosen with the rows after it still at their float values, `w_0 + <x_0, (X_f - X) w> / <x_0, x_0>`; all rows
    after it then follow by least squares, and from there on it is GPTQ on the shifted target. Moving row 0 of that target there,
    and the others as conditional least squares demands, says the same.

    Args:
      w_kn: the kernel `[K, N]`.
      target_kn: W' of `shifted_target`.
      l_kk: L, rows and columns as in `w_kn`.
      h_kk: the undamped Hessian.
      drift_kk: C, rows and columns as in L.
      alpha: the fraction that is corrected.

    Returns:
      What `compensate` starts from, in place of W'.
    """
    live = h_kk[0, 0] > 0
    pull_n = alpha * product(drift_kk[:1], w_kn)[0]
    first_n = w_kn[0] + jnp.where(live, pull_n / jnp.where(live, h_kk[0, 0], 1.0), 0.0)
    one_k1 = jnp.zeros((w_kn.shape[0], 1), w_kn.dtype).at[0].set(1.0)
    u_k1 = triangular.solve(l_kk, one_k1)  # the first row of U
    return target_kn - u_k1 * ((target_kn[0] - first_n) / u_k1[0])[None]
