"""How products are cut up: a table of measured tilings, by device, and a rule where the table has no entry.

Nothing is tried at import or at the first call. `benchmarks/gpu/tune_int4_matmul.py` makes the table.
"""

import dataclasses
import functools
import json
from importlib.resources import files
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.int4_matmul.planes import Planes
from pallas_kernels.int4_matmul.runtime import TILE
from pallas_kernels.int4_matmul.triton import Form, Tiling

BUCKETS = (1, 2, 4, 16, 32, 64, 128, 256)
"""A product of m rows has the tiling of the first of these that is at least m. Above the last, kernels are expanded."""
MULTIPROCESSORS = 132
"""Of an H100 and an H200: what the rule counts with."""
SPLITS = (1, 2, 4, 8, 16)
"""Parts that K may be cut into."""


def bucket_of(m: int) -> int | None:
    """The bucket of a number of rows, None above the last."""
    return next((bucket for bucket in BUCKETS if m <= bucket), None)


def key_of(device_kind: str, jax_version: str, m: int, layout: Planes, dtype: Any) -> str:
    """Where the table holds a product: device, release of jax, K, N, group size, width, dtype and bucket."""
    facts = (device_kind, jax_version, layout.k, layout.n, layout.group_size, layout.bits, jnp.dtype(dtype).name, bucket_of(m))
    return " | ".join(map(str, facts))


@functools.cache
def table() -> dict[str, Tiling]:
    """The committed table."""
    return {key: Tiling(**entry) for key, entry in json.loads((files(__package__) / "tunings.json").read_text()).items()}


def tiling_of(m: int, layout: Planes, dtype: Any) -> Tiling | None:
    """How to cut up a product of m rows with a kernel on this process' device; None where it is expanded instead."""
    if bucket_of(m) is None:
        return None
    key = key_of(jax.devices()[0].device_kind, jax.__version__, m, layout, dtype)
    return table().get(key) or rule(m, layout, dtype)


def rule(m: int, layout: Planes, dtype: Any) -> Tiling:
    """The tiling where nothing was measured.

    Up to 16 rows x is the left operand, padded to the 16 rows that a matrix unit takes; for more rows the weights are, which
    Hopper's wgmma reads from registers. K is cut into as many parts as give every multiprocessor two programs, each of four tiles
    at least.
    """
    bucket = bucket_of(m)
    if bucket is None:
        raise ValueError(f"no kernel takes {m} rows at once; at most {BUCKETS[-1]}")
    swapped = bucket >= 32 and dtype != jnp.float32
    block_m = min(max(16, bucket), 64 if dtype == jnp.float32 else 128)
    wide = swapped and layout.padded_n % 128 == 0 and (block_m <= 64 if layout.scale_rows >= TILE else block_m <= 32)
    block_n = 128 if wide else 64  # accumulators of both the group and the sum have to stay in registers
    programs = layout.padded_n // block_n * -(-m // block_m)
    least_tiles = min(4, layout.tiles)
    fits = [split_k for split_k in SPLITS if layout.tiles % split_k == 0 and layout.tiles // split_k >= least_tiles]
    split_k = next((split_k for split_k in fits if programs * split_k >= 2 * MULTIPROCESSORS), fits[-1])
    return Tiling(
        form="swapped" if swapped else "planes",
        block_m=block_m,
        block_n=block_n,
        split_k=split_k,
        num_warps=4,
        num_stages=4 if block_m <= 64 else 3,
    )


def candidates(m: int, layout: Planes, dtype: Any) -> list[Tiling]:
    """All tilings that fit a product, before those that compile badly are sorted out."""
    bucket = bucket_of(m)
    if bucket is None:
        return []
    splits = [split_k for split_k in SPLITS if layout.tiles % split_k == 0]
    blocks_n = [block_n for block_n in (64, 128) if layout.padded_n % block_n == 0]
    forms: list[tuple[Form, int]] = [("gemv", bucket)] if bucket <= 4 else []
    forms += [("planes", max(16, min(bucket, 64)))]
    if dtype != jnp.float32 and bucket >= 16:
        forms += [("swapped", block_m) for block_m in (16, 32, 64, 128) if block_m <= bucket]
    return [
        Tiling(form=form, block_m=block_m, block_n=block_n, split_k=split_k, num_warps=num_warps, num_stages=num_stages)
        for form, block_m in forms
        for block_n in blocks_n
        for split_k in splits
        for num_warps in (4, 8)
        for num_stages in (3, 4, 5)
    ]


def neighbours(m: int, layout: Planes, dtype: Any, most: int) -> list[Tiling]:
    """The candidates that differ least from the rule's tiling, nearest first, the rule's own left out: what a short tuning tries.

    Args:
      m: rows of x.
      layout: of the kernel.
      dtype: of x.
      most: how many to return at most.
    """
    ruled = rule(m, layout, dtype)

    def distance(tiling: Tiling) -> int:
        return sum(a != b for a, b in zip(dataclasses.astuple(tiling), dataclasses.astuple(ruled), strict=True))

    others = [tiling for tiling in candidates(m, layout, dtype) if tiling != ruled]
    return sorted(others, key=distance)[:most]
