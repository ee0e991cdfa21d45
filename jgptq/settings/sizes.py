"""The sizes that the packed formats can hold."""

from collections.abc import Sequence

BITS = (2, 3, 4, 8)
"""Widths of a code."""
ROW_MULTIPLE = 32
"""K and N of a packed linear, and every group size, are multiples of this: 32 codes fill whole int32 words at any bit width."""


def group_rows(k: int, group_size: int) -> int:
    """The number of rows in a group of a linear with `k` in-features: `group_size`, or `k` where it is -1."""
    return k if group_size == -1 else group_size


def fitting_group_sizes(k_sizes: Sequence[int]) -> list[int]:
    """The group sizes that divide every K in `k_sizes`: -1, and the common ones up to 1024."""
    common = (32, 64, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024)
    return [-1, *(g for g in common if all(k % g == 0 for k in k_sizes))]


def packable(k: int, n: int) -> str | None:
    """None if a `[k, n]` linear can be held by the packed formats, else the reason, as a phrase."""
    bad = [f"{name}={size}" for name, size in (("K", k), ("N", n)) if size % ROW_MULTIPLE]
    return None if not bad else f"{' and '.join(bad)} {'is' if len(bad) == 1 else 'are'} not a multiple of {ROW_MULTIPLE}"
