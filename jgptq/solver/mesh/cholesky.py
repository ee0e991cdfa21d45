"""The lower factor L of the Hessian, `H = L^T L`, on slabs: panel by panel, in place.

All functions here are called on every device, inside `shard_map`, with its own slab `[K, C]` of columns.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jgptq.notation import Float, Int
from jgptq.solver.linalg.cholesky import Factor, all_finite, diagonal, raised_until_finite
from jgptq.solver.linalg.triangular import lower_factor, product, transposed, transposed_solve
from jgptq.solver.mesh import axes as sharding
from jgptq.solver.mesh.slabs import PANEL, Slabs, first_column, gathered_rows, on_all_devices, own_columns, permuted

_MAX_TILE = 2048


def slab_diagonal(slab_kc: Float[jax.Array, "K C"]) -> Float[jax.Array, " K"]:
    """The diagonal of the whole matrix, on every device."""
    width = slab_kc.shape[1]
    own_cc = jax.lax.dynamic_slice_in_dim(slab_kc, first_column(width), width)
    return jax.lax.all_gather(diagonal(own_cc), sharding.ALL, tiled=True)


def factor_blocks(factor: Factor[Slabs], block: int) -> Float[jax.Array, "C B B"]:
    """`cholesky.diagonal_blocks` of the first K rows and columns of a factor in slabs, on every device; zeros if it is not
    finite."""
    slab_pc, k = factor.kk.values, factor.kk.k
    width = slab_pc.shape[1]
    rows_cb = jnp.arange(k).reshape(-1, block)
    own_cb = rows_cb - first_column(width)
    part_cbb = slab_pc[rows_cb[:, :, None], jnp.clip(own_cb, 0, width - 1)[:, None, :]]
    # That the factor is finite was agreed on by all devices before: without such an order between them, devices that wait for
    # each other in two sums at once may wait forever.
    is_own_cb = factor.finite & (own_cb >= 0) & (own_cb < width)
    return jax.lax.psum(jnp.where(is_own_cb[:, None, :], part_cbb, 0.0), sharding.ALL)


def damped_slabs(h: Slabs, rows_k: Int[jax.Array, " K"], damping: float) -> Factor[Slabs]:
    """`jgptq.solver.linalg.cholesky.damped_factor` of `H[rows, :][:, rows]`, on slabs.

    Args:
      h: this device's columns of H, in file order; they are only read.
      rows_k: a permutation of K; rows of padding follow, and are dead.
      damping: the first lambda.

    Returns:
      This device's columns of L, in the solver's sequence; the lambda that all of L needed, and whether all of it is finite.
    """

    def attempt(added: jax.Array, memory_pc: jax.Array) -> tuple[jax.Array, jax.Array]:
        l_pc = _factored(permuted(h, rows_k, added, memory_pc))
        return l_pc, on_all_devices(all_finite(l_pc))

    start = Factor(jnp.zeros_like(h.values), jnp.float32(0), jnp.bool_(False))
    factor = raised_until_finite(attempt, start, slab_diagonal(h.values), damping)
    return Factor(dataclasses.replace(h, values=factor.kk), factor.damping, factor.finite)


def _factored(a_kc: jax.Array) -> jax.Array:
    """L in the place of a positive definite A, `A = L^T L`, by eliminating panels of rows from the last to the first.

    Before panel j is eliminated, its rows hold the Schur complement of the panels after it in the columns up to j. With L_jj from
    the complement's corner, `L_j: = L_jj^-T A_j:` left of it, and every earlier row i takes its share, `A_i: -= L_ji^T L_j:`. So
    each step sends one panel of rows to every device.
    """
    k, width = a_kc.shape
    tile = min(_MAX_TILE, k)

    def eliminate(step: jax.Array, a_kc: jax.Array) -> jax.Array:
        start = (k // PANEL - 1 - step) * PANEL
        complement_bk = gathered_rows(a_kc, start, PANEL)
        corner_bb = jax.lax.dynamic_slice_in_dim(complement_bk, start, PANEL, axis=1)
        l_bb = lower_factor(corner_bb, jnp.zeros((), corner_bb.dtype))
        row_bk = jnp.where(jnp.arange(k)[None, :] < start, transposed_solve(l_bb, complement_bk), 0.0)
        row_bk = jax.lax.dynamic_update_slice_in_dim(row_bk, l_bb, start, 1)
        row_bc = own_columns(row_bk, width)
        a_kc = jax.lax.dynamic_update_slice_in_dim(a_kc, row_bc, start, 0)

        def spread(number: jax.Array, a_kc: jax.Array) -> jax.Array:
            # The last tile may begin within the one before, whose rows are done, and end beyond the rows that have a share.
            first = jnp.minimum(number * tile, k - tile)
            at_t = first + jnp.arange(tile)
            due_t = (at_t >= number * tile) & (at_t < start)
            r_bt = jnp.where(due_t[None, :], jax.lax.dynamic_slice_in_dim(row_bk, first, tile, axis=1), 0.0)
            a_tc = jax.lax.dynamic_slice_in_dim(a_kc, first, tile)
            return jax.lax.dynamic_update_slice_in_dim(a_kc, a_tc - product(transposed(r_bt), row_bc), first, 0)

        return jax.lax.fori_loop(0, -(-start // tile), spread, a_kc)

    return jax.lax.fori_loop(0, k // PANEL, eliminate, a_kc)
