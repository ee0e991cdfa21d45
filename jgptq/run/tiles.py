"""The linears of a stage, solved as tiles of one wide matrix.

Linears that read the same activations share a Hessian, so that their kernels, side by side, are one problem. It is cut into
tiles of equally many columns: memory does not grow with the width of the stage, and one compiled program serves all stages
that read equally many features.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jgptq.models.packed import PackedTensor, pack
from jgptq.notation import Array, Float, Int
from jgptq.settings.sizes import ROW_MULTIPLE
from jgptq.settings.solver import SolverConfig
from jgptq.solver import ONE_DEVICE, Placement, Prepared, judge_columns, prepare, round_to_nearest
from jgptq.solver.methods import method_of
from jgptq.solver.statistics.drift import StageSums

Part = TypeVar("Part", jax.Array, np.ndarray)
_CPU_COLUMNS = 4096
_COLUMNS = 32768
_STEPS_IN_COLUMNS = 1024  # a tile's steps take as long as this many columns, on a CPU


class SolvedLinear(NamedTuple):
    """What files and reports hold of one linear, or of a tile of columns."""

    packed: PackedTensor
    loss_n: Float[Array, " N"]
    rtn_loss_n: Float[Array, " N"]


class SolvedStage(NamedTuple):
    """The linears of a stage, in its order."""

    linears: list[SolvedLinear]  # in host memory
    kernels: list[
        Float[jax.Array, "K N"]
    ]  # what the model computes with from here on: expanded, in the dtype that it computes in
    damping: Float[jax.Array, ""]
    outcome: Int[Array, ""]  # the worst of the tiles, an `Outcome`


def tile_columns(widths: Sequence[int]) -> int:
    """Columns in a tile, the same for all stages that read the same number of features.

    The time of a tile is a constant, for the steps of the solver's loop, plus a part for each column. The width is the one for
    which all tiles together take the least time. Wider tiles cost memory, and columns that are computed and not used.

    Args:
      widths: the out-features of each such stage, all its linears together.

    Returns:
      The width of a tile, a multiple of 32.
    """
    most = _CPU_COLUMNS if jax.default_backend() == "cpu" else _COLUMNS
    parts = {_round_up(-(-width // count)) for width in widths for count in range(-(-width // most), 9)}

    def cost(columns: int) -> int:
        return sum(-(-width // columns) for width in widths) * (columns + _STEPS_IN_COLUMNS)

    return min((columns for columns in parts if columns <= most), key=cost, default=most)


def _round_up(columns: int) -> int:
    return -(-columns // ROW_MULTIPLE) * ROW_MULTIPLE


class PreparedStage(NamedTuple):
    """What all columns of a stage share, and what the residual stream lost before they are added to it."""

    shared: Prepared
    residual_kd: Float[jax.Array, "K D"] | None  # None where the columns are not added to the stream


def prepare_stage(
    total: StageSums, config: SolverConfig, placement: Placement = ONE_DEVICE, *, pulled: bool = False
) -> PreparedStage:
    """The Hessian of the sums, prepared for all columns that read what was summed.

    Args:
      total: from `placement.empty_sums` and `placement.accumulate`; gone afterwards where the placement reuses sums.
      config: the solver's settings, or a run's.
      placement: where the sums lie, and where the columns are solved.
      pulled: whether the sums hold what the stage gives in the float model (`jgptq.run.batches.Observation.pull`).

    Returns:
      What `solve_stage` takes.
    """
    with _precision(config):
        residual_kd = _mean_residual(total, placement) if method_of(config).statistics.residual else None
        program = prepare_program(placement)
        return PreparedStage(program(total.without_residual(), config.solver, placement, pulled=pulled), residual_kd)


def prepare_program(placement: Placement) -> Any:
    """The jitted function of sums, settings and placement that gives a `Prepared`; it takes the memory of the sums where the
    placement reuses them."""
    return _prepare_over_sums if placement.reuses_sums else _prepare


def _prepared(total: StageSums, config: SolverConfig, placement: Placement, *, pulled: bool) -> Prepared:
    means = placement.means(total)
    return prepare(means.h_kk, config, means.drift_kk, placement=placement, pulled=pulled)


_prepare = jax.jit(_prepared, static_argnames=("config", "placement", "pulled"))
_prepare_over_sums = jax.jit(_prepared, static_argnames=("config", "placement", "pulled"), donate_argnames="total")


@functools.partial(jax.jit, static_argnames="placement")
def _mean_residual(total: StageSums, placement: Placement) -> jax.Array | None:
    return placement.means(total).residual_kn


def _precision(config: SolverConfig) -> contextlib.AbstractContextManager[object]:
    return jax.enable_x64(True) if config.float64 else contextlib.nullcontext()


def solve_stage(
    kernels: tuple[Float[jax.Array, "K N"], ...],
    prepared: PreparedStage | None,
    config: SolverConfig,
    *,
    columns: int,
    dtype: jnp.dtype,
) -> SolvedStage:
    """Quantizes kernels on the Hessian that they share.

    Args:
      kernels: `[K, N_i]`, of any float dtype.
      prepared: from `prepare_stage`, with the placement that it was given; None only for round-to-nearest without tokens, whose
        losses are then NaN.
      config: the solver's settings, or a run's.
      columns: width of a tile, from `tile_columns`.
      dtype: of the expanded kernels.

    Returns:
      The solved stage.
    """
    widths = tuple(kernel.shape[1] for kernel in kernels)
    starts = _starts(sum(widths), columns)
    shared = None if prepared is None else prepared.shared
    residuals = _residuals(prepared, config, starts, columns)
    with _precision(config):
        tiles = [
            _solve_tile(tile, shared, residual_kn, config.solver, dtype)
            for tile, residual_kn in zip(_cut(kernels, starts, columns), residuals, strict=True)
        ]
    return SolvedStage(
        linears=_join([jax.device_get(tile.linear) for tile in tiles], starts, widths),
        kernels=_join_kernels([tile.kernel for tile in tiles], starts, widths),
        damping=tiles[0].damping,
        outcome=np.max([tile.outcome for tile in tiles]),
    )


def stage_programs(
    total: StageSums, config: SolverConfig, *, columns: int, dtype: jnp.dtype, placement: Placement, pulled: bool
) -> list[Callable[[], object]]:
    """What `prepare_stage` and `solve_stage` compile for all stages of a K and of these settings, each as a function to call.

    Args:
      total: the sums, of shapes alone.
      config: the solver's settings.
      columns: width of a tile.
      dtype: of the expanded kernels.
      placement: where the sums lie.
      pulled: as for `prepare_stage`.
    """
    sums = total.without_residual()

    def prepared() -> Prepared:
        settled = functools.partial(_prepared, config=config.solver, placement=placement, pulled=pulled)
        return jax.eval_shape(settled, sums)

    def compile_prepare() -> object:
        with _precision(config):
            return prepare_program(placement).lower(sums, config.solver, placement, pulled=pulled).compile()

    def compile_solve() -> object:
        with _precision(config):
            shared = prepared()
            tile = jax.ShapeDtypeStruct((shared.sequence.rows_k.shape[0], columns), jnp.float32)
            residual_kd = jax.eval_shape(functools.partial(_mean_residual, placement=placement), total)
            reads_residual = _reads_residual(config, shared, residual_kd)
            return _solve_tile.lower(tile, shared, tile if reads_residual else None, config.solver, dtype).compile()

    return [compile_prepare, compile_solve]


def _reads_residual(config: SolverConfig, shared: Prepared, residual_kd: object | None) -> bool:
    """Whether the program of a tile takes a residual: where there is one, and where other stages of the K have one."""
    return method_of(config).statistics.residual and (residual_kd is not None or shared.drift_kk is not None)


def _residuals(
    prepared: PreparedStage | None, config: SolverConfig, starts: tuple[int, ...], columns: int
) -> Sequence[jax.Array | None]:
    """The residual of each tile. Where a method reads one and there is none it is zero: one program serves all stages of a K."""
    if prepared is None or not _reads_residual(config, prepared.shared, prepared.residual_kd):
        return [None] * len(starts)
    if prepared.residual_kd is None:
        nothing_kn = jax.device_put(np.zeros((prepared.shared.sequence.rows_k.shape[0], columns), np.float32))
        return [nothing_kn] * len(starts)
    return _cut((prepared.residual_kd,), starts, columns)


class _Tile(NamedTuple):
    linear: SolvedLinear
    kernel: jax.Array
    damping: jax.Array
    outcome: jax.Array


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _solve_tile(
    w_kn: jax.Array, prepared: Prepared | None, residual_kn: jax.Array | None, config: SolverConfig, dtype: jnp.dtype
) -> _Tile:
    """All that is computed for a tile between the Hessian's factor and the packed result, as one program."""
    solution = round_to_nearest(w_kn, config) if prepared is None else judge_columns(w_kn, prepared, config, residual_kn)
    packed = pack(
        solution.codes_kn,
        solution.scale_gn,
        None if config.sym else solution.zero_gn,
        solution.group_k,
        bits=config.bits,
        group_size=config.group_size,
    )
    rtn_loss_n = solution.loss_n if solution.rtn_loss_n is None else solution.rtn_loss_n
    linear = SolvedLinear(packed, solution.loss_n, rtn_loss_n)
    return _Tile(linear, solution.dequantize().astype(dtype), solution.damping, solution.outcome)


def _starts(width: int, columns: int) -> tuple[int, ...]:
    """Where each tile begins. The last one ends with the matrix and may overlap the one before, whose columns it repeats."""
    return (*range(0, width - columns, columns), max(0, width - columns))


@functools.partial(jax.jit, static_argnames=("starts", "columns"))
def _cut(kernels: tuple[jax.Array, ...], starts: tuple[int, ...], columns: int) -> list[jax.Array]:
    """The tiles of the kernels side by side, float32; zeros fill up what is narrower than a tile."""
    wide_kn = jnp.concatenate(kernels, axis=1)
    wide_kn = jnp.pad(wide_kn, ((0, 0), (0, max(0, columns - wide_kn.shape[1]))))
    return [wide_kn[:, start : start + columns].astype(jnp.float32) for start in starts]


def _join(tiles: list[SolvedLinear], starts: tuple[int, ...], widths: tuple[int, ...]) -> list[SolvedLinear]:
    """The linears that tiles were cut from."""
    k, columns = tiles[0].packed.shape
    index_k = tiles[0].packed.group_index
    tiles = [tile._replace(packed=dataclasses.replace(tile.packed, group_index=None)) for tile in tiles]
    parts = [
        _resplit(np.concatenate, leaves, starts, widths, columns) for leaves in zip(*map(jax.tree.leaves, tiles), strict=True)
    ]
    linears = [jax.tree.unflatten(jax.tree.structure(tiles[0]), part) for part in zip(*parts, strict=True)]
    shapes = [(k, width) for width in widths]
    return [
        linear._replace(packed=dataclasses.replace(linear.packed, group_index=index_k, shape=shape))
        for linear, shape in zip(linears, shapes, strict=True)
    ]


@functools.partial(jax.jit, static_argnames=("starts", "widths"))
def _join_kernels(kernels: list[jax.Array], starts: tuple[int, ...], widths: tuple[int, ...]) -> list[jax.Array]:
    return _resplit(jnp.concatenate, kernels, starts, widths, kernels[0].shape[1])


def _resplit(
    concatenate: Callable[..., Part], tiles: Sequence[Part], starts: tuple[int, ...], widths: tuple[int, ...], columns: int
) -> list[Part]:
    """Cuts tiles into parts of these widths along their last axis: columns, or `bits/32` of them in packed zero points."""
    total, size = sum(widths), tiles[0].shape[-1]
    ends = (*starts[1:], total)
    used = [tile[..., : (end - start) * size // columns] for tile, start, end in zip(tiles, starts, ends, strict=True)]
    wide, bounds = concatenate(used, axis=-1), [sum(widths[:index]) * size // columns for index in range(len(widths) + 1)]
    return [wide[..., first:last] for first, last in itertools.pairwise(bounds)]
