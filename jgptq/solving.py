"""The linears of a stage, solved as tiles of one wide matrix.

Linears that read the same activations share a Hessian, so that their kernels, side by side, are one problem. It is cut into
tiles of equally many columns: memory does not grow with the width of the stage, and one compiled program serves all stages
that read equally many features.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jgptq.config import QuantizeConfig
from jgptq.notation import Float, Int
from jgptq.packed import PackedTensor, pack
from jgptq.solver import Prepared, prepare, round_to_nearest, solve_columns
from jgptq.solver.hessian import HessianSum, hessian

_CPU_COLUMNS = 2048
_COLUMNS = 32768


class SolvedLinear(NamedTuple):
    """One linear, or a tile of columns."""

    packed: PackedTensor
    kernel: Float[jax.Array, "K N"]  # expanded, in the dtype that the model computes in
    loss_n: Float[jax.Array, " N"]
    rtn_loss_n: Float[jax.Array, " N"]


class SolvedStage(NamedTuple):
    """The linears of a stage, in its order."""

    linears: tuple[SolvedLinear, ...]
    damping: Float[jax.Array, ""]
    outcome: Int[jax.Array, ""]  # the worst of the tiles, an `Outcome`


def tile_columns(widths: Sequence[int]) -> int:
    """Columns in a tile for all stages that read the same number of features.

    The narrowest stage is one tile, if that bounds memory: wide enough to keep the steps of the solver's loop busy. A GPU needs
    more columns for that than a CPU, and has the memory.

    Args:
      widths: the out-features of each such stage, all its linears together.

    Returns:
      The width of a tile, at most that of the narrowest stage.
    """
    return min(*widths, _CPU_COLUMNS if jax.default_backend() == "cpu" else _COLUMNS)


@functools.partial(jax.jit, static_argnames="config")
def prepare_stage(total: HessianSum, config: QuantizeConfig) -> Prepared:
    """The Hessian of a sum, prepared for all columns that read what was summed."""
    return prepare(hessian(total), config)


def solve_stage(
    kernels: tuple[Float[jax.Array, "K N"], ...],
    prepared: Prepared | None,
    config: QuantizeConfig,
    *,
    columns: int,
    dtype: jnp.dtype,
) -> SolvedStage:
    """Quantizes kernels on the Hessian that they share.

    Args:
      kernels: `[K, N_i]`, of any float dtype.
      prepared: from `prepare_stage`; None only for method "rtn", whose losses are then NaN.
      config: the run's settings.
      columns: width of a tile, from `tile_columns`.
      dtype: of the expanded kernels.

    Returns:
      The solved stage.
    """
    starts = _starts(sum(kernel.shape[1] for kernel in kernels), columns)
    found = [_solve_tile(tile, prepared, config, dtype) for tile in _cut(kernels, starts, columns)]
    linears = _join(tuple(tile.linears[0] for tile in found), starts, tuple(kernel.shape[1] for kernel in kernels))
    return SolvedStage(linears, found[0].damping, functools.reduce(jnp.maximum, [tile.outcome for tile in found]))


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _solve_tile(w_kn: jax.Array, prepared: Prepared | None, config: QuantizeConfig, dtype: jnp.dtype) -> SolvedStage:
    """All that is computed for a tile between the Hessian's factor and the packed result, as one program."""
    solution = round_to_nearest(w_kn, config) if prepared is None else solve_columns(w_kn, prepared, config)
    zero_gn = None if config.sym else solution.zero_gn
    packed = pack(solution.codes_kn, solution.scale_gn, zero_gn, bits=config.bits, group_size=config.group_size)
    linear = SolvedLinear(packed, solution.dequantize().astype(dtype), solution.loss_n, solution.rtn_loss_n)
    return SolvedStage((linear,), solution.damping, solution.outcome)


def _starts(width: int, columns: int) -> tuple[int, ...]:
    """Where each tile begins. The last one ends with the matrix and may overlap the one before, whose columns it repeats."""
    return (*range(0, width - columns, columns), width - columns)


@functools.partial(jax.jit, static_argnames=("starts", "columns"))
def _cut(kernels: tuple[jax.Array, ...], starts: tuple[int, ...], columns: int) -> list[jax.Array]:
    """The tiles of the kernels side by side, float32."""
    wide_kn = jnp.concatenate(kernels, axis=1)
    return [wide_kn[:, start : start + columns].astype(jnp.float32) for start in starts]


@functools.partial(jax.jit, static_argnames=("starts", "widths"))
def _join(tiles: tuple[SolvedLinear, ...], starts: tuple[int, ...], widths: tuple[int, ...]) -> tuple[SolvedLinear, ...]:
    """The linears that tiles were cut from. Every leaf of a tile has columns as its last axis, zero points `bits/32` of them."""
    columns, ends = tiles[0].packed.shape[1], (*starts[1:], sum(widths))
    bounds = [sum(widths[:index]) for index in range(len(widths) + 1)]

    def split(*leaves: jax.Array) -> list[jax.Array]:
        size = leaves[0].shape[-1]
        used = [leaf[..., : (end - start) * size // columns] for leaf, start, end in zip(leaves, starts, ends, strict=True)]
        wide = jnp.concatenate(used, axis=-1)
        return [wide[..., first * size // columns : last * size // columns] for first, last in itertools.pairwise(bounds)]

    parts = [split(*leaves) for leaves in zip(*map(jax.tree.leaves, tiles), strict=True)]
    linears = [jax.tree.unflatten(jax.tree.structure(tiles[0]), leaves) for leaves in zip(*parts, strict=True)]
    shapes = [(tiles[0].packed.shape[0], width) for width in widths]
    return tuple(
        linear._replace(packed=dataclasses.replace(linear.packed, shape=shape))
        for linear, shape in zip(linears, shapes, strict=True)
    )
