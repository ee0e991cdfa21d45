"""What both runtime layouts share: the sizes of a kernel, with its padding, and the rows of K that share a scale.

A kernel in the file layout is converted once, when weights are loaded (`planes.to_runtime`, `int4_rows.to_int4_rows`).
"""

import dataclasses
from typing import ClassVar

VERSION = 1
TILE = 128
"""Rows of K that a kernel reads at a time: K is padded to a multiple of it."""
BITS = (4, 8)
"""Widths of a code that have a runtime layout."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuntimeLayout:
    """The sizes of one kernel in a runtime layout; static under jit.

    Raises:
      ValueError: a version or width that this release does not know, or sizes that do not agree.
    """

    COLUMN_MULTIPLE: ClassVar[int] = 8  # N is padded to a multiple of it

    k: int  # in-features, without padding
    n: int  # out-features, without padding
    bits: int  # width of a code: 4 or 8
    group_size: int  # rows of K in a group of the file
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.version != VERSION:
            advice = "convert the file layout again, or install the release that made it"
            raise ValueError(f"runtime layout version {self.version} is unknown, this release has version {VERSION}; {advice}")
        if self.bits not in BITS:
            raise ValueError(f"the runtime layout holds codes of {BITS} bits, found {self.bits}; others run in the file layout")
        check_sizes(self.k, self.n, self.group_size)

    @property
    def tiles(self) -> int:
        """Tiles of K."""
        return -(-self.k // TILE)

    @property
    def padded_k(self) -> int:
        """In-features, padded to whole tiles."""
        return self.tiles * TILE

    @property
    def padded_n(self) -> int:
        """Out-features, padded."""
        return -(-self.n // self.COLUMN_MULTIPLE) * self.COLUMN_MULTIPLE

    @property
    def scale_rows(self) -> int:
        """Rows of K that share a scale at runtime. Groups that would end within a tile are cut into equal parts that do not."""
        if self.group_size == self.k:
            return self.padded_k
        return next(
            rows for rows in (self.group_size, 64, 32) if self.group_size % rows == 0 and (rows in (32, 64) or rows % TILE == 0)
        )

    @property
    def scale_count(self) -> int:
        """Scales of one column, those of padding included."""
        return -(-self.padded_k // self.scale_rows)


def check_sizes(k: int, n: int, group_size: int) -> None:
    """Raises a ValueError that says everything that is wrong with the sizes of a packed kernel."""
    wrong = []
    if k <= 0 or k % 32:
        wrong.append(f"K must be a positive multiple of 32, found {k}")
    if n <= 0 or n % 8:
        wrong.append(f"N must be a positive multiple of 8, found {n}")
    if group_size <= 0 or k % group_size or (group_size != k and group_size % 32):
        wrong.append(f"group_size must be a multiple of 32 that divides K = {k}, or K itself, found {group_size}")
    if wrong:
        raise ValueError("; ".join(wrong))
