"""How products are cut up: a table of what was measured, by device, and a rule where there is no entry.

Nothing is tried at import or at the first call. `benchmarks/gpu/tune_int4_matmul.py` makes the table.
"""

import functools
import json
from importlib.resources import files
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.int4_matmul.planes import TILE, Planes
from pallas_kernels.int4_matmul.triton import Form, Tiling

BUCKETS = (1, 2, 4, 16, 32, 64, 128, 256)
"""Numbers of rows of x that are cut up alike, each for all above the one before it. Above the last, kernels are expanded."""
MULTIPROCESSORS = 132
"""That the rule counts with: those of an H100 and an H200."""


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
    """What is done where nothing was measured.

    Up to 16 rows x is the left operand, filled up to the 16 rows that a matrix unit takes; from there on the weights are, which
    Hopper's wgmma reads from registers. K is cut into as many parts as give every multiprocessor two programs, of four tiles at
    the least.
    """
    bucket = bucket_of(m)
    if bucket is None:
        raise ValueError(f"no kernel takes {m} rows at once; at most {BUCKETS[-1]}")
    swapped = bucket >= 32 and dtype != jnp.float32
    rows = min(max(16, bucket), 64 if dtype == jnp.float32 else 128)
    wide = swapped and layout.padded_n % 128 == 0 and (rows <= 64 if layout.rows >= TILE else rows <= 32)
    columns = 128 if wide else 64  # accumulators of both the group and the sum have to stay in registers
    programs = layout.padded_n // columns * -(-m // rows)
    fits = [parts for parts in (1, 2, 4, 8, 16) if layout.tiles % parts == 0 and layout.tiles // parts >= min(4, layout.tiles)]
    parts = next((parts for parts in fits if programs * parts >= 2 * MULTIPROCESSORS), fits[-1])
    stages = 4 if rows <= 64 else 3
    return Tiling(form="swapped" if swapped else "planes", rows=rows, columns=columns, parts=parts, warps=4, stages=stages)


def candidates(m: int, layout: Planes, dtype: Any) -> list[Tiling]:
    """All that the tuner tries for a product, before those that compile badly are sorted out."""
    bucket = bucket_of(m)
    if bucket is None:
        return []
    parts_of = [parts for parts in (1, 2, 4, 8, 16) if layout.tiles % parts == 0]
    columns_of = [columns for columns in (64, 128) if layout.padded_n % columns == 0]
    shapes: list[tuple[Form, int]] = [("gemv", bucket)] if bucket <= 4 else []
    shapes += [("planes", max(16, min(bucket, 64)))]
    if dtype != jnp.float32 and bucket >= 16:
        shapes += [("swapped", rows) for rows in (16, 32, 64, 128) if rows <= bucket]
    return [
        Tiling(form=form, rows=rows, columns=columns, parts=parts, warps=warps, stages=stages)
        for form, rows in shapes
        for columns in columns_of
        for parts in parts_of
        for warps in (4, 8)
        for stages in (3, 4, 5)
    ]
