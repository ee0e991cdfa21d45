"""What a block of the solver takes and gives: grids, the search for them, and the result."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax


class Arithmetic(NamedTuple):
    """Operations that compilers approximate and that a search of grids needs exact; a kernel has its own."""

    divide: Callable[[jax.Array, jax.Array], jax.Array]  # rounded once
    round: Callable[[jax.Array], jax.Array]  # half to even
    divisor: Callable[[jax.Array], jax.Array]  # of a constant to divide by: XLA would multiply by its reciprocal


Search = Callable[[jax.Array, jax.Array, Arithmetic], tuple[jax.Array, jax.Array]]
"""From the rows of a group `[R, N]`, their weights `[R]` and exact arithmetic to the group's scale and zero point, each `[N]`.
Rows of zeros must not change the result: a kernel passes all rows of the block, those of other groups as zeros."""


class Given(NamedTuple):
    """Grids that are known before the block."""

    scale_rn: jax.Array  # [R, N], or [1, N] where all rows share a grid
    zero_rn: jax.Array  # of the same shape, integers


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weight_r"], meta_fields=["group_size", "search"])
@dataclasses.dataclass(frozen=True)
class Searched:
    """Grids that are searched inside the block: a group's from its rows as updated by all rows before the group."""

    weight_r: jax.Array  # [R], passed to the search
    group_size: int  # rows in a group; a multiple of 32 that divides R
    search: Search


class BlockResult(NamedTuple):
    """What `gptq_block` gives for R rows and N columns."""

    codes_rn: jax.Array  # uint8 [R, N], unsigned codes
    error_rn: jax.Array  # [R, N], (w - dequantized) / u_kk, to be spread over the rows after the block
    updated_rn: jax.Array  # [R, N], each row as it was quantized, updated by all rows before it; [0, N] without a drift
    scale_gn: jax.Array  # [G, N], of runs of R / G rows: as given, or as searched
    zero_gn: jax.Array  # of the same shape
