"""One linear's solve on a mesh: the Hessian and its factor in slabs, output columns divided over all devices."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jgptq.errors import ConfigError
from jgptq.notation import Float, Int
from jgptq.settings.sizes import group_rows
from jgptq.settings.solver import SolverConfig
from jgptq.solver.checks import factor_outcome
from jgptq.solver.compensate import solver_block
from jgptq.solver.linalg.cholesky import added_damping, all_finite
from jgptq.solver.linalg.triangular import inverse_transposed, product
from jgptq.solver.mesh import axes as sharding
from jgptq.solver.mesh.cholesky import damped_slabs, factor_blocks, slab_diagonal
from jgptq.solver.mesh.slabs import Slabs, chunk_rows, gathered_rows, on_all_devices, on_slabs
from jgptq.solver.order import RowOrder, row_order
from jgptq.solver.outcome import Outcome
from jgptq.solver.solution import Solution, diagnose, round_to_nearest, summed, undamped_loss
from jgptq.solver.solve import in_file_order, quantize_rows


class ShardedPrepared(NamedTuple):
    """What all columns on one Hessian share; `jgptq.solver.Prepared` in slabs."""

    h: Slabs  # undamped, in file order
    factor: Slabs | None  # lower factor of the damped H, in the solver's sequence; None for round-to-nearest
    u_cbb: Float[jax.Array, "C B B"] | None  # L_BB^-T of each block of the loop, whole on every device; likewise
    order: RowOrder  # of the K rows that are not padding, whole on every device
    diag_k: Float[jax.Array, " K"]  # of H, in file order, likewise
    damping: Float[jax.Array, ""]
    outcome: Int[jax.Array, ""]


def prepare(h: Slabs, config: SolverConfig) -> ShardedPrepared:
    """Orders the rows of K and factors the damped Hessian on its slabs: `jgptq.solver.prepare`, as one program.

    A device holds its slab of H, its slab of L, and a few panels of rows. Rows of padding come last and are dead.

    Args:
      h: the Hessian of `jgptq.solver.mesh.slabs.hessian`.
      config: group size, method, order, damping.

    Returns:
      What `solve_columns` takes.

    Raises:
      ConfigError: a setting that is only solved on one device.
    """
    one_device = {"method": config.method in ("gptq", "rtn"), "refine": config.refine == 0, "refit": not config.refit}
    one_device |= {"float64": not config.float64}
    if refused := [name for name, fits in one_device.items() if not fits]:
        raise ConfigError(f"a mesh solves methods gptq and rtn, in float32 and without refinement; change {', '.join(refused)}")
    factor, shared = factored(h, config)
    return ShardedPrepared(h, factor, *shared)


class _Shared(NamedTuple):
    """The small parts of `ShardedPrepared`, whole on every device."""

    u_cbb: jax.Array | None
    order: RowOrder
    diag_k: jax.Array
    damping: jax.Array
    outcome: jax.Array


@functools.partial(jax.jit, static_argnames="config")
def factored(h: Slabs, config: SolverConfig) -> tuple[Slabs | None, _Shared]:
    """All of `prepare`; H itself would be copied on its way out of a program."""

    def local(h_kc: jax.Array) -> tuple[jax.Array | None, _Shared]:
        diag_k = slab_diagonal(h_kc)[: h.k]
        finite = on_all_devices(all_finite(h_kc) & jnp.all(jnp.isfinite(diag_k)))
        rows = group_rows(h.k, config.group_size)
        if config.method == "rtn":
            outcome = jnp.where(finite, Outcome.ROUNDED, Outcome.NONFINITE_HESSIAN)
            return None, _Shared(None, row_order("none", diag_k, rows), diag_k, jnp.float32(0), outcome)
        order = row_order(config.order, diag_k, rows)
        rows_k = jnp.concatenate([order.rows_k, jnp.arange(h.k, h_kc.shape[0])])
        factor = damped_slabs(h_kc, rows_k, config.damping)
        # Slabs are summed as `h^T h`: there is nothing that could make them differ from their mirror image.
        outcome = factor_outcome(factor, diag_k, config, finite=finite, symmetric=jnp.bool_(True))
        u_cbb = inverse_transposed(factor_blocks(factor, h.k, solver_block(h.k, rows)))
        return factor.kk, _Shared(u_cbb, order, diag_k, factor.damping, outcome)

    l_pp, shared = on_slabs(local, h.mesh, sharding.COLUMNS, (sharding.COLUMNS, sharding.WHOLE))(h.values)
    return None if l_pp is None else Slabs(l_pp, h.k, h.mesh), shared


@functools.partial(jax.jit, static_argnames="config")
def solve_columns(w_kn: Float[jax.Array, "K N"], prepared: ShardedPrepared, config: SolverConfig) -> Solution:
    """Quantizes columns, equally many on each device: `jgptq.solver.solve_columns` on a mesh.

    Columns need nothing of each other; a block's rows of L are gathered when its turn comes, and rows of H for the losses.

    Args:
      w_kn: float32 `[K, N]`, in file order; best in the layout `axes.by_columns` already. Where devices do not divide
        N, columns of zeros fill up.
      prepared: from `prepare`, with the same config; a config of method "rtn" takes any.
      config: bits, group size, grid, method.

    Returns:
      The solution, its columns divided over the devices; check `outcome` before use.

    Raises:
      ConfigError: K is not that of the Hessian, or the Hessian was prepared for another method.
    """
    h, mesh = prepared.h, prepared.h.mesh
    k, n = w_kn.shape
    if k != h.k:
        raise ConfigError(f"a kernel of {k} in-features cannot be solved on a Hessian of {h.k}")
    if config.method != "rtn" and prepared.factor is None:
        raise ConfigError('the Hessian was prepared for method "rtn"; prepare it with the config of this solve')
    own = functools.partial(_solve_own, config=config, chunk=chunk_rows(h.values.shape[0], mesh))
    specs = (sharding.COLUMNS, sharding.COLUMNS, sharding.COLUMNS, sharding.WHOLE)
    shared = _Shared(prepared.u_cbb, prepared.order, prepared.diag_k, prepared.damping, prepared.outcome)
    l_pp = None if prepared.factor is None else prepared.factor.values
    columns_kn = jnp.pad(w_kn, ((0, 0), (0, -n % mesh.size)))
    layout = Solution(**_WHERE | {"group_k": sharding.WHOLE if config.order == "desc_act" else None})
    found = on_slabs(own, mesh, specs, layout)(columns_kn, h.values, l_pp, shared)
    group_k = found.group_k
    cut = jax.tree.map(lambda leaf: leaf[..., :n] if leaf.ndim else leaf, found._replace(group_k=None))
    return diagnose(cut._replace(group_k=group_k), w_kn)


_WHERE: dict[str, Any] = {
    "codes_kn": sharding.COLUMNS,
    "scale_gn": sharding.COLUMNS,
    "zero_gn": sharding.COLUMNS,
    "loss_n": sharding.VECTOR,
    "rtn_loss_n": sharding.VECTOR,
    "damping": sharding.WHOLE,
    "outcome": sharding.WHOLE,
}


def _solve_own(
    w_kn: jax.Array,
    h_pc: jax.Array,
    l_pc: jax.Array | None,
    shared: _Shared,
    config: SolverConfig,
    chunk: int,
) -> Solution:
    """On every device: its own columns of the kernel, its own slabs. What depends on the values of all columns is left open."""
    k = w_kn.shape[0]
    rounded = round_to_nearest(w_kn, config, shared.diag_k)
    rtn_loss_n = _gathered_loss(w_kn - rounded.dequantize(), h_pc, chunk)
    if config.method == "rtn" or l_pc is None or shared.u_cbb is None:
        outcome = jnp.where(shared.outcome == Outcome.NONFINITE_HESSIAN, shared.outcome, Outcome.ROUNDED)
        return rounded._replace(loss_n=rtn_loss_n, rtn_loss_n=rtn_loss_n, outcome=outcome)

    def l_rows(start: jax.Array, size: int) -> jax.Array:
        return gathered_rows(l_pc, start, size)[:, :k]

    rows_k = shared.order.rows_k
    found = quantize_rows(w_kn[rows_k], l_rows, shared.u_cbb, shared.diag_k[rows_k], shared.order, config)
    solution = in_file_order(found, shared.order, group_rows(k, config.group_size), config)
    return solution._replace(
        loss_n=undamped_loss(found, added_damping(shared.diag_k, shared.damping)),
        rtn_loss_n=rtn_loss_n,
        damping=shared.damping,
        outcome=shared.outcome,
    )


def _gathered_loss(dw_kn: jax.Array, h_pc: jax.Array, chunk: int) -> jax.Array:
    """`dW^T H dW` of this device's columns, rows in file order; all of H passes by, a chunk of rows at a time."""
    size = h_pc.shape[0]
    dw_pn = jnp.pad(dw_kn, ((0, size - dw_kn.shape[0]), (0, 0)))

    def add(index: jax.Array, loss_n: jax.Array) -> jax.Array:
        h_rp = gathered_rows(h_pc, index * chunk, chunk)
        dw_rn = jax.lax.dynamic_slice_in_dim(dw_pn, index * chunk, chunk)
        return loss_n + summed(dw_rn * product(h_rp, dw_pn))

    return jax.lax.fori_loop(0, size // chunk, add, jnp.zeros(dw_kn.shape[1], jnp.float32))
