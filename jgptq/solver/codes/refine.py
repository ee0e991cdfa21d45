"""Coordinate descent over the codes, alternating with scales and zero points re-fitted for them.

The solver's loop is greedy: it never returns to a row's code. Here every code is chosen again with all others held, and then the
scale and zero point of its group. The loss cannot rise; see `refine`.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jgptq.notation import Float
from jgptq.settings.sizes import ROW_MULTIPLE
from jgptq.solver.codes.compensate import solver_block
from jgptq.solver.codes.grid import Grid, storable
from jgptq.solver.linalg.triangular import product, transposed
from jgptq.solver.one_device import WholeMatrix
from jgptq.solver.placement import Matrix

_STEP = ROW_MULTIPLE
SWEEPS = 2
"""Passes over the codes of a block in one round, while its residual gradient is in a cache."""


class Refined(NamedTuple):
    """Codes and grids, in the sequence of rows that they were given in."""

    codes_kn: Float[jax.Array, "K N"]  # integers
    grid: Grid  # [G, N]


def refine(
    codes_kn: Float[jax.Array, "K N"],
    grid: Grid,
    target_kn: Float[jax.Array, "K N"],
    h: Matrix,
    *,
    group_size: int,
    rounds: int,
    bits: int,
    sym: bool,
    sweeps: int = SWEEPS,
) -> Refined:
    """Lowers `tr((W - Q)^T H (W - Q))` over codes, scales and zero points.

    With the residual gradient `R = H (W - Q)`, code j moves to the nearest grid point of `q_j + R_j / H_jj` and
    `R -= H[:, j] dq_j`: the exact minimum over one code (cyclic coordinate descent, as in QuantEase, arXiv 2309.01885). After
    the sweeps of a group its grid is re-fitted for its new codes, all others held: with a = code - zero,
    `s = a^T (R_g + H_gg q_g) / (a^T H_gg a)`, for every zero point where the grid is asymmetric; the scale is rounded to the
    file's float16 first, and kept only if the loss is lower with it so rounded. So no step raises the loss, and groups that come
    later make up for the rounding of scales of those before.

    Args:
      codes_kn: integers `[K, N]`; groups are runs of rows.
      grid: scales and zero points `[G, N]`.
      target_kn: W, `[K, N]`.
      h: the damped Hessian, symmetric, in the same sequence of rows.
      group_size: rows in a group; divides K.
      rounds: passes over all groups.
      bits: width of a code.
      sym: whether zero points stay where they are.
      sweeps: passes over the codes of a block in one round; 0 re-fits scales only.

    Returns:
      Codes and grids.
    """
    k = target_kn.shape[0]
    descent = _Descent(h=h, group_size=group_size, block=solver_block(k, group_size), sweeps=sweeps, bits=bits, sym=sym)
    carry = Refined(codes_kn, grid), h.times(target_kn - _points(codes_kn, grid))
    refined, _ = jax.lax.fori_loop(0, rounds * (k // descent.block), descent.refine_block, carry)
    return refined


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Descent:
    """What stays the same from block to block, and the step that is made of it."""

    h: Matrix
    group_size: int
    block: int  # rows whose codes are chosen with one residual gradient in a cache
    sweeps: int
    bits: int
    sym: bool

    def refine_block(self, index: jax.Array, carry: tuple[Refined, jax.Array]) -> tuple[Refined, jax.Array]:
        """Chooses the codes of a block again, and re-fits the groups that end with it."""
        refined, gradient_kn = carry
        block, group_size = self.block, self.group_size
        part = min(group_size, block)  # rows on one grid within a block
        start = (index % (gradient_kn.shape[0] // block)) * block
        h_bk = self.h.rows(start, block)
        h_bb = jax.lax.dynamic_slice_in_dim(h_bk, start, block, axis=1)
        codes_bn = jax.lax.dynamic_slice_in_dim(refined.codes_kn, start, block)
        gradient_bn = jax.lax.dynamic_slice_in_dim(gradient_kn, start, block)
        group = start // group_size
        of_block = jax.tree.map(lambda all_gn: jax.lax.dynamic_slice_in_dim(all_gn, group, block // part), refined.grid)
        before_bn = _points(codes_bn, of_block)
        codes_bn, gradient_bn = _sweep(codes_bn, gradient_bn, h_bb, of_block, self.bits, self.sweeps)
        if group_size <= block:
            of_block = _refit_groups(codes_bn, of_block, gradient_bn, h_bb, self.bits, self.sym)
        moved_bn = _points(codes_bn, of_block) - before_bn
        grid = jax.tree.map(
            lambda all_gn, new: jax.lax.dynamic_update_slice_in_dim(all_gn, new, group, 0), refined.grid, of_block
        )
        refined = Refined(jax.lax.dynamic_update_slice_in_dim(refined.codes_kn, codes_bn, start, 0), grid)
        gradient_kn = gradient_kn - product(transposed(h_bk), moved_bn)
        if group_size > block:
            refined, gradient_kn = jax.lax.cond(
                (start + block) % group_size == 0,
                lambda: _refit_wide(refined, gradient_kn, self.h, group, group_size, self.bits, self.sym),
                lambda: (refined, gradient_kn),
            )
        return refined, gradient_kn


def refit_grid(
    codes_rn: Float[jax.Array, "R N"],
    grid: Grid,
    gradient_rn: Float[jax.Array, "R N"],
    h: Matrix,
    start: jax.Array | int,
    bits: int,
    sym: bool,
) -> Grid:
    """The best grid of one group for codes that are given, everything outside of the group held.

    In terms of the scale the loss is `const - 2 s b + s^2 m`, with `b = a^T (R + H q)`, `m = a^T H a`, `a = code - zero`; all
    that depends on the zero point follows from five products.

    Args:
      codes_rn: integers `[R, N]`.
      grid: the present scale and zero point of each column, `[N]`.
      gradient_rn: `R = H (W - Q)` at these rows.
      h: the damped Hessian.
      start: the group's first row in it.
      bits: width of a code.
      sym: whether the zero point stays where it is.

    Returns:
      The grid with the least loss among those whose scale is a positive float16; the present one where none is better.
    """
    present = _on_grid(codes_rn, grid)
    h_codes_rn, h_ones_r = h.times(codes_rn, start), h.row_sums(start, codes_rn.shape[0])
    pull_rn = gradient_rn + h.times(present, start)
    cc_n, c1_n, ones = jnp.sum(codes_rn * h_codes_rn, 0), jnp.sum(codes_rn * h_ones_r[:, None], 0), jnp.sum(h_ones_r)
    bc_n, b1_n = jnp.sum(codes_rn * pull_rn, 0), jnp.sum(pull_rn, 0)

    def lowered(zero_n: jax.Array, scale_n: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """The loss below that of a scale of zero, at a given scale or at the best one."""
        m_n, b_n = cc_n - 2 * zero_n * c1_n + zero_n**2 * ones, bc_n - zero_n * b1_n
        usable = (m_n > 0) & (b_n > 0)
        if scale_n is None:
            scale_n = storable(jnp.where(usable, b_n / jnp.where(usable, m_n, 1.0), 1.0))
            return jnp.where(usable & jnp.isfinite(scale_n), 2 * scale_n * b_n - scale_n**2 * m_n, -jnp.inf), scale_n
        return 2 * scale_n * b_n - scale_n**2 * m_n, scale_n

    def better(best: tuple[jax.Array, Grid], zero_n: jax.Array) -> tuple[tuple[jax.Array, Grid], None]:
        most_n, at = best
        gain_n, scale_n = lowered(zero_n, None)
        wins_n = gain_n > most_n
        return (
            jnp.where(wins_n, gain_n, most_n),
            jax.tree.map(functools.partial(jnp.where, wins_n), Grid(scale_n, zero_n), at),
        ), None

    present_gain = lowered(grid.zero_n, grid.scale_n)[0], grid
    if sym:
        return better(present_gain, grid.zero_n)[0][1]
    zeros = jnp.arange(2**bits, dtype=codes_rn.dtype)
    (_, best), _ = jax.lax.scan(lambda carry, zero: better(carry, jnp.full_like(grid.zero_n, zero)), present_gain, zeros)
    return best


def _sweep(
    codes_bn: jax.Array, gradient_bn: jax.Array, h_bb: jax.Array, grid: Grid, bits: int, sweeps: int
) -> tuple[jax.Array, jax.Array]:
    """Passes of coordinate descent over a block; returns its codes and its residual gradient."""
    block = codes_bn.shape[0]
    part = block // grid.scale_n.shape[0]

    def run_step(step: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        codes_bn, gradient_bn = carry
        row = (step % (block // _STEP)) * _STEP
        scale_n, zero_n = (jax.lax.dynamic_index_in_dim(a, row // part, keepdims=False) for a in grid)
        codes_rn, gradient_rn = (jax.lax.dynamic_slice_in_dim(a, row, _STEP) for a in (codes_bn, gradient_bn))
        h_rr = jax.lax.dynamic_slice(h_bb, (row, row), (_STEP, _STEP))
        new_rn, moved_rn = _descend(codes_rn, gradient_rn, h_rr, scale_n, zero_n, bits)
        gradient_bn = gradient_bn - product(jax.lax.dynamic_slice_in_dim(h_bb, row, _STEP, axis=1), moved_rn)
        return jax.lax.dynamic_update_slice_in_dim(codes_bn, new_rn, row, 0), gradient_bn

    return jax.lax.fori_loop(0, sweeps * (block // _STEP), run_step, (codes_bn, gradient_bn))


def _descend(
    codes_rn: jax.Array, gradient_rn: jax.Array, h_rr: jax.Array, scale_n: jax.Array, zero_n: jax.Array, bits: int
) -> tuple[jax.Array, jax.Array]:
    """One pass over R rows on one grid; returns the codes and by how much the weights moved."""

    def step(j: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        new_rn, moved_rn = carry
        # The rows after row j have not moved yet, so that the whole row of H may be used.
        gradient_n = gradient_rn[j] - product(h_rr[j], moved_rn)
        curvature = h_rr[j, j]
        step_n = jnp.where(curvature > 0, gradient_n / jnp.where(curvature > 0, curvature, 1.0), 0.0)
        code_n = jnp.clip(codes_rn[j] + jnp.round(step_n / scale_n), 0, 2**bits - 1)
        put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=j, axis=0)
        return put(new_rn, code_n), put(moved_rn, scale_n * (code_n - codes_rn[j]))

    return jax.lax.fori_loop(0, codes_rn.shape[0], step, (codes_rn, jnp.zeros_like(gradient_rn)))


def _refit_groups(codes_bn: jax.Array, grid: Grid, gradient_bn: jax.Array, h_bb: jax.Array, bits: int, sym: bool) -> Grid:
    """Re-fits the groups of a block one after the other."""
    groups = grid.scale_n.shape[0]
    part = codes_bn.shape[0] // groups

    def run_group(group: jax.Array, carry: tuple[Grid, jax.Array]) -> tuple[Grid, jax.Array]:
        grid, gradient_bn = carry
        start = group * part
        codes_rn, gradient_rn = (jax.lax.dynamic_slice_in_dim(a, start, part) for a in (codes_bn, gradient_bn))
        old = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, group, keepdims=False), grid)
        new = refit_grid(codes_rn, old, gradient_rn, WholeMatrix(h_bb), start, bits, sym)
        moved_rn = _on_grid(codes_rn, new) - _on_grid(codes_rn, old)
        gradient_bn = gradient_bn - product(jax.lax.dynamic_slice_in_dim(h_bb, start, part, axis=1), moved_rn)
        grid = jax.tree.map(lambda a, one: jax.lax.dynamic_update_index_in_dim(a, one, group, 0), grid, new)
        return grid, gradient_bn

    return jax.lax.fori_loop(0, groups, run_group, (grid, gradient_bn))[0]


def _refit_wide(
    refined: Refined, gradient_kn: jax.Array, h: Matrix, group: jax.Array, size: int, bits: int, sym: bool
) -> tuple[Refined, jax.Array]:
    """Re-fits a group of `size` rows, wider than a block."""
    start = group * size
    codes_rn, gradient_rn = (jax.lax.dynamic_slice_in_dim(a, start, size) for a in (refined.codes_kn, gradient_kn))
    old = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, group, keepdims=False), refined.grid)
    new = refit_grid(codes_rn, old, gradient_rn, h, start, bits, sym)
    moved_rn = _on_grid(codes_rn, new) - _on_grid(codes_rn, old)
    gradient_kn = gradient_kn - h.columns_times(moved_rn, start)
    grid = jax.tree.map(lambda a, one: jax.lax.dynamic_update_index_in_dim(a, one, group, 0), refined.grid, new)
    return refined._replace(grid=grid), gradient_kn


def _on_grid(codes_rn: jax.Array, grid: Grid) -> jax.Array:
    """`scale * (code - zero)`, of rows on one grid."""
    return grid.scale_n[None] * (codes_rn - grid.zero_n[None])


def _points(codes_kn: jax.Array, grid: Grid) -> jax.Array:
    """`scale * (code - zero)`."""
    groups, n = grid.scale_n.shape
    codes_grn = codes_kn.reshape(groups, -1, n)
    return (grid.scale_n[:, None] * (codes_grn - grid.zero_n[:, None])).reshape(-1, n)
