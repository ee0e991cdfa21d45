"""One linear's solve: weights and a Hessian in, codes, scales and a diagnosis out."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jgptq.errors import ConfigError
from jgptq.notation import Float
from jgptq.settings.sizes import group_rows
from jgptq.settings.solver import SolverConfig
from jgptq.solver.checks import check_k, factor_outcome, solver_dtype
from jgptq.solver.codes.compensate import solver_block
from jgptq.solver.codes.sequence import Sequence, row_sequence
from jgptq.solver.linalg.triangular import inverse_transposed
from jgptq.solver.methods import Statistics, method_of
from jgptq.solver.one_device import ONE_DEVICE
from jgptq.solver.outcome import Outcome
from jgptq.solver.placement import Placement
from jgptq.solver.prepared import Prepared
from jgptq.solver.solution import Solution, diagnose, round_to_nearest


def prepare(
    h_kk: Any, config: SolverConfig, drift_kk: Any = None, *, placement: Placement = ONE_DEVICE, pulled: bool = False
) -> Prepared:
    """Orders the rows of K and factors the damped Hessian once for all columns.

    Args:
      h_kk: `[K, K]`, the Hessian of `placement.means`; on one device an array. Outside of jit it is kept, not copied.
      config: group size, method, order, damping, float64.
      drift_kk: `2/T X^T (X_f - X)` of the same means, for the shift of targets and the asymmetric methods; None solves without.
      placement: where the matrices lie: `jgptq.solver.ONE_DEVICE`, or `jgptq.solver.mesh.OnMesh`.
      pulled: whether the columns' residuals hold `a/b X^T X_f W` as well, in place of a drift_kk
        (`jgptq.solver.codes.target`).

    Returns:
      What `solve_columns` takes.

    Raises:
      ConfigError: a Hessian that is not square, a drift of another shape, a method that needs a drift and has none, or float64
        where jax computes in float32 alone.
    """
    config = config.solver
    reads = method_of(config).statistics
    _check_drift(config, reads, drift_kk)
    dtype = solver_dtype(config.float64)
    k = placement.matrix(h_kk).k
    if drift_kk is not None:
        check_k("a drift", placement.matrix(drift_kk).k, k, "the Hessian")
    h_kk = placement.cast(h_kk, dtype)
    drift_kk = placement.cast(drift_kk, dtype) if reads.drift and drift_kk is not None else None
    factor, shared = _factored(h_kk, drift_kk, config, placement)
    return Prepared(h_kk=h_kk, factor=factor, drift_kk=drift_kk, placement=placement, pulled=pulled, **shared._asdict())


class _Shared(NamedTuple):
    """What is computed of a `Prepared`, besides the factor: the rest is no result of this program, which would copy it."""

    u_cbb: jax.Array | None
    sequence: Sequence
    damping: jax.Array
    outcome: jax.Array


@functools.partial(jax.jit, static_argnames=("config", "placement"))
def _factored(h_kk: Any, drift_kk: Any, config: SolverConfig, placement: Placement) -> tuple[Any, _Shared]:
    method = method_of(config)

    def on_device(h: Any, drift: Any) -> tuple[Any, _Shared]:
        matrix = placement.matrix(h)
        group_size = group_rows(matrix.k, config.group_size)
        diag_k = matrix.diagonal()
        finite, symmetric = matrix.examined()
        sequence = row_sequence(method.order, diag_k, group_size)
        if not method.statistics.factor:
            outcome = jnp.where(finite, Outcome.SOLVED, Outcome.NONFINITE_HESSIAN)
            return None, _Shared(None, sequence, jnp.float32(0), method.outcome(outcome))
        factor = placement.factor(h, sequence.rows_k, config.damping)
        if drift is not None:
            finite = finite & placement.matrix(drift).finite()
        raised = factor.damping > config.damping
        outcome = factor_outcome(raised, factor.finite, diag_k, finite=finite, symmetric=symmetric)
        l_cbb = placement.diagonal_blocks(factor, solver_block(matrix.k, group_size))
        return factor.kk, _Shared(inverse_transposed(l_cbb), sequence, factor.damping, outcome)

    return placement.on_matrices(on_device, h_kk, drift_kk)


def _check_drift(config: SolverConfig, reads: Statistics, drift_kk: Any) -> None:
    """Refuses a solve without the drift that its method needs."""
    if drift_kk is None and reads.needs_drift:
        raise ConfigError(f"method {config.method!r} needs the drift of the inputs: give drift_kk to prepare, or target_shift=0")


def solve_columns(
    w_kn: Float[jax.Array, "K N"],
    prepared: Prepared,
    config: SolverConfig,
    residual_kn: Float[jax.Array, "K N"] | None = None,
) -> Solution:
    """Quantizes columns on a prepared Hessian; columns do not depend on each other, so any slice of a kernel may be given.

    Args:
      w_kn: `[K, N]`, in file order; K a multiple of the group size. On a mesh best in the layout
        `jgptq.solver.mesh.axes.by_columns` already.
      prepared: from `prepare`, with the same config; a config of method "rtn" takes any.
      config: bits, group size, grid, method.
      residual_kn: `2/T X^T D`, with D what the residual stream lost before these columns' outputs are added to it; or None.

    Returns:
      The solution, without the loss of round-to-nearest, on a mesh with its columns divided over the devices; check `outcome`
      before use.

    Raises:
      ConfigError: K is not that of the Hessian, or the Hessian was prepared without the factor or the drift that the method
        reads.
    """
    return _solve(w_kn, prepared, residual_kn, config.solver, judged=False)


def judge_columns(
    w_kn: Float[jax.Array, "K N"],
    prepared: Prepared,
    config: SolverConfig,
    residual_kn: Float[jax.Array, "K N"] | None = None,
) -> Solution:
    """`solve_columns`, and what round-to-nearest would lose on the same columns against the same target: K^2 N/2 more
    multiplications.

    Args, Returns, Raises: those of `solve_columns`; `rtn_loss_n` is there as well.
    """
    return _solve(w_kn, prepared, residual_kn, config.solver, judged=True)


@functools.partial(jax.jit, static_argnames=("config", "judged"))
def _solve(w_kn: jax.Array, prepared: Prepared, residual_kn: jax.Array | None, config: SolverConfig, *, judged: bool) -> Solution:
    method = method_of(config)
    h = prepared.placement.matrix(prepared.h_kk)
    check_k("a kernel", w_kn.shape[0], h.k, "the Hessian")
    _check_drift(config, method.statistics, prepared.drift_kk)
    w_kn = w_kn.astype(h.dtype)
    if residual_kn is not None:
        check_k("a residual", residual_kn.shape[0], h.k, "the Hessian")
        residual_kn = residual_kn.astype(h.dtype) if method.statistics.residual else None

    def on_device(columns: tuple[jax.Array, jax.Array | None], prepared: Prepared) -> Solution:
        w_kn, residual_kn = columns
        placement, h = prepared.placement, prepared.placement.matrix(prepared.h_kk)
        diag_k = h.diagonal()
        w_kn = placement.after(w_kn, diag_k)
        result = method.quantize(w_kn, residual_kn, prepared)
        solution = Solution(
            codes_kn=result.codes_kn,
            scale_gn=result.scale_gn.astype(jnp.float16),
            zero_gn=result.zero_gn.astype(jnp.int32),
            group_k=result.group_k,
            loss_n=jnp.zeros((w_kn.shape[1],), w_kn.dtype),
            rtn_loss_n=None,
            damping=prepared.damping if method.statistics.factor else jnp.float32(0),
            outcome=method.outcome(prepared.outcome),
        )

        def loss_of(quantized: Solution) -> jax.Array:
            return h.quadratic(result.target_kn - quantized.dequantize().astype(w_kn.dtype))

        solution = solution._replace(loss_n=loss_of(solution) if result.loss_n is None else result.loss_n)
        if not judged:
            return solution
        if method.is_nearest:
            return solution._replace(rtn_loss_n=solution.loss_n)
        # After the loop, whose memory is free by then.
        w_kn, _ = jax.lax.optimization_barrier((placement.after(w_kn, solution.loss_n), solution.loss_n))
        return solution._replace(rtn_loss_n=loss_of(round_to_nearest(w_kn, config, diag_k)))

    return diagnose(prepared.placement.on_columns(on_device, (w_kn, residual_kn), prepared), w_kn)


def solve(
    w_kn: Float[jax.Array, "K N"],
    h_kk: Any,
    config: SolverConfig,
    *,
    drift_kk: Any = None,
    residual_kn: Float[jax.Array, "K N"] | None = None,
    placement: Placement = ONE_DEVICE,
) -> Solution:
    """Quantizes a kernel so that its output error `tr((W - Q)^T H (W - Q))` is small (GPTQ, Frantar et al. 2022, algorithm 1).

    Rows are quantized in sequence; the error of each is spread over the rows after it, `w_j -= u[k, j] e_k`, with `H^-1 = U^T U`
    (`jgptq.solver.codes.compensate` says how that is done without U).
    A group's grid is set from its rows as those before them leave them. Linears that share H are solved at once: put them side by
    side. Where a drift or a residual is given, W is the shifted target of `jgptq.solver.codes.target`.

    Args:
      w_kn: `[K, N]`; K a multiple of the group size.
      h_kk: `[K, K]`, the Hessian of `placement.means`; on one device an array.
      config: bits, group size, grid, method, order, damping.
      drift_kk: `2/T X^T (X_f - X)`, of the same means, or None.
      residual_kn: `2/T X^T D`, or None.
      placement: where the matrices lie.

    Returns:
      The solution, with the loss of round-to-nearest; check `outcome` before use.

    Raises:
      ConfigError: shapes that do not agree, or a method that needs a drift and has none.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jgptq.settings.solver import SolverConfig
      >>> x_tk = jax.random.normal(jax.random.key(0), (256, 64))
      >>> solution = solve(jnp.ones((64, 32)), 2 / 256 * x_tk.T @ x_tk, SolverConfig(group_size=32))
      >>> Outcome(int(solution.outcome)).name
      'SOLVED'
    """
    check_k("a kernel", w_kn.shape[0], placement.matrix(h_kk).k, "the Hessian")
    return judge_columns(w_kn, prepare(h_kk, config, drift_kk, placement=placement), config, residual_kn)


def solve_many(w_ekn: Float[jax.Array, "E K N"], h_ekk: Float[jax.Array, "E K K"], config: SolverConfig) -> Solution:
    """`solve` for a batch of problems of one shape on one device, such as the experts of a layer."""
    return _solve_many(w_ekn, h_ekk, config.solver)


_solve_many = jax.jit(jax.vmap(solve, in_axes=(0, 0, None)), static_argnums=2)
