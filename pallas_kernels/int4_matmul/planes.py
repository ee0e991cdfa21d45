"""The runtime layout: codes as the GPU kernels read them, made once, when weights are loaded.

K is cut into tiles of 128 rows, the last one filled up with zeros. A tile of b-bit codes is `W = 4 b` rows of int32 words, and
code p of a word, from the lowest bits on, belongs to plane p:

    row k = 128 t + W p + j   is in   word row W t + j,  bits [b p, b p + b)

So the rows of a plane are contiguous, in x too: a kernel takes one word, and each of its 32 / b codes is multiplied with another
slice of x, without moving anything between threads. Planes lie within groups, of 32 rows at the least.

An act-order becomes a permutation of K, applied to x once: groups are contiguous at runtime. Scales stay as they are; zero points
become int8 differences from the middle of the grid. N is filled up to a multiple of 64 with scales of zero.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.layout import pack_codes, unpack_codes

VERSION = 1
TILE = 128
COLUMNS = 64
BITS = (4, 8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planes:
    """The runtime layout of one kernel; static under jit.

    Raises:
      ValueError: a version or width that this release does not know, or sizes that do not agree.
    """

    k: int  # in-features, without what fills up the last tile
    n: int  # out-features, likewise
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
    def words(self) -> int:
        """Rows of words in a tile, and rows of K in a plane."""
        return 4 * self.bits

    @property
    def planes(self) -> int:
        """Codes in a word."""
        return 32 // self.bits

    @property
    def tiles(self) -> int:
        """Tiles of K."""
        return -(-self.k // TILE)

    @property
    def padded_k(self) -> int:
        """In-features, with what fills up the last tile."""
        return self.tiles * TILE

    @property
    def padded_n(self) -> int:
        """Out-features, filled up to whole columns of tiles."""
        return -(-self.n // COLUMNS) * COLUMNS

    @property
    def rows(self) -> int:
        """Rows of K that share a row of scales at runtime: groups that end within tiles are cut into equal parts that do not."""
        if self.group_size == self.k:
            return self.padded_k
        return next(
            rows for rows in (self.group_size, 64, 32) if self.group_size % rows == 0 and (rows in (32, 64) or rows % TILE == 0)
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RuntimeKernel:
    """A packed kernel in the runtime layout."""

    qweight: jax.Array  # int32 [tiles * words, padded N]
    scales: jax.Array  # [ceil(padded K / rows), padded N], of the file's dtype
    zeros: jax.Array | None  # int8 likewise, zero points less 2^(bits-1); None for a symmetric grid
    order: jax.Array | None  # int32 [K], the file's row that runtime row k is; None where they are the same
    layout: Planes = dataclasses.field(metadata={"static": True})


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


def to_runtime(
    qweight: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None = None,
    order: jax.Array | None = None,
    *,
    group_size: int,
    bits: int = 4,
) -> RuntimeKernel:
    """Converts a kernel from the file layout; `to_file` is the exact inverse.

    Args:
      qweight: int32 `[K*bits/32, N]`.
      scales: `[G, N]`.
      zeros: int32 `[G, N*bits/32]`, or None.
      order: int32 `[K]`, the group of each row, or None for contiguous groups; concrete, not traced.
      group_size: rows in a group, or -1 for all of K.
      bits: 4 or 8.

    Returns:
      The kernel.

    Raises:
      ValueError: a width that has no runtime layout, sizes that do not agree, groups that are not equally large.
    """
    k, n = qweight.shape[0] * 32 // bits, qweight.shape[1]
    layout = Planes(k=k, n=n, bits=bits, group_size=k if group_size == -1 else group_size)
    groups = k // layout.group_size
    if scales.shape != (groups, n):
        raise ValueError(f"scales must be {[groups, n]} for qweight {list(qweight.shape)}, found {list(scales.shape)}")
    codes_kn = unpack_codes(qweight, bits)
    rows_k = None
    if order is not None:
        sizes = jnp.bincount(order, length=groups)
        if not bool(jnp.all(sizes == layout.group_size)):
            raise ValueError(f"order must give every group {layout.group_size} rows, found {sizes.tolist()}; use the file layout")
        rows_k = jnp.argsort(order, stable=True).astype(jnp.int32)
        codes_kn = codes_kn[rows_k]
    zeros_rn = None
    if zeros is not None:
        offset_gn = unpack_codes(zeros.T, bits).T - 2 ** (bits - 1)
        zeros_rn = _per_rows(offset_gn.astype(jnp.int8), layout)
    return RuntimeKernel(
        qweight=to_planes(codes_kn, layout), scales=_per_rows(scales, layout), zeros=zeros_rn, order=rows_k, layout=layout
    )


def to_file(kernel: RuntimeKernel) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    """Converts back: qweight, scales, zeros and order, as `to_runtime` was given them."""
    layout = kernel.layout
    codes_kn, order_k = codes_of(kernel.qweight, layout), None
    if kernel.order is not None:
        back_k = jnp.argsort(kernel.order)
        codes_kn, order_k = codes_kn[back_k], back_k.astype(jnp.int32) // layout.group_size
    zeros = None
    if kernel.zeros is not None:
        zero_gn = _per_group(kernel.zeros, layout).astype(jnp.int32) + 2 ** (layout.bits - 1)
        zeros = pack_codes(zero_gn.T, layout.bits).T
    return pack_codes(codes_kn, layout.bits), _per_group(kernel.scales, layout), zeros, order_k


def codes_of(qweight: jax.Array, layout: Planes) -> jax.Array:
    """The codes, int32 `[K, N]`, rows in the runtime's order."""
    words_twn = jax.lax.bitcast_convert_type(qweight, jnp.uint32).reshape(layout.tiles, 1, layout.words, -1)
    shift_p = (jnp.arange(layout.planes, dtype=jnp.uint32) * jnp.uint32(layout.bits)).reshape(1, -1, 1, 1)
    codes = (words_twn >> shift_p) & jnp.uint32(2**layout.bits - 1)
    return codes.astype(jnp.int32).reshape(layout.padded_k, -1)[: layout.k, : layout.n]


def expanded(kernel: RuntimeKernel) -> jax.Array:
    """`scale * (code - zero)`, float32 `[K, N]`, rows in the runtime's order."""
    layout = kernel.layout
    offset_kn = codes_of(kernel.qweight, layout) - 2 ** (layout.bits - 1)
    if kernel.zeros is not None:
        offset_kn = offset_kn - _per_row(kernel.zeros, layout).astype(jnp.int32)
    return offset_kn.astype(jnp.float32) * _per_row(kernel.scales, layout).astype(jnp.float32)


def obstacle(kernels: Sequence[RuntimeKernel]) -> str | None:
    """Why kernels cannot lie side by side as one; None where they can."""
    first = kernels[0]
    for other in kernels[1:]:
        facts = [(one.layout.k, one.layout.bits, one.layout.group_size, one.zeros is None) for one in (first, other)]
        if facts[0] != facts[1]:
            return f"fused kernels must agree in (K, bits, group_size, symmetric), found {facts[0]} and {facts[1]}"
        if (first.order is None) != (other.order is None) or (
            first.order is not None and other.order is not None and not bool(jnp.all(first.order == other.order))
        ):
            return "fused kernels must have the same order of rows: x is permuted once for all of them"
    return None


def fuse(kernels: Sequence[RuntimeKernel]) -> RuntimeKernel:
    """Kernels that read the same x, side by side, as one: its outputs are theirs, one after the other.

    Raises:
      ValueError: they differ in K, width, groups, in having zero points, or in their order.
    """
    if reason := obstacle(kernels):
        raise ValueError(reason)
    first = kernels[0]
    layout = dataclasses.replace(first.layout, n=sum(kernel.layout.n for kernel in kernels))

    def beside(parts: Sequence[jax.Array]) -> jax.Array:
        wide = jnp.concatenate([part[:, : kernel.layout.n] for part, kernel in zip(parts, kernels, strict=True)], axis=1)
        return _filled(wide, wide.shape[0], layout.padded_n)

    zeros = [kernel.zeros for kernel in kernels if kernel.zeros is not None]
    return RuntimeKernel(
        qweight=beside([kernel.qweight for kernel in kernels]),
        scales=beside([kernel.scales for kernel in kernels]),
        zeros=beside(zeros) if zeros else None,
        order=first.order,
        layout=layout,
    )


def to_planes(codes_kn: jax.Array, layout: Planes) -> jax.Array:
    """Codes `[K, N]`, rows in the runtime's order, as words."""
    filled = _filled(codes_kn.astype(jnp.uint32), layout.padded_k, layout.padded_n)
    tiles = filled.reshape(layout.tiles, layout.planes, layout.words, layout.padded_n)
    words = jnp.zeros((layout.tiles, layout.words, layout.padded_n), jnp.uint32)
    for plane in range(layout.planes):
        words = words | tiles[:, plane] << jnp.uint32(layout.bits * plane)
    return jax.lax.bitcast_convert_type(words, jnp.int32).reshape(-1, layout.padded_n)


def _per_rows(per_group: jax.Array, layout: Planes) -> jax.Array:
    """From the file's groups to the runtime's rows of scales."""
    parts = 1 if layout.group_size == layout.k else layout.group_size // layout.rows
    return _filled(jnp.repeat(per_group, parts, axis=0), -(-layout.padded_k // layout.rows), layout.padded_n)


def _per_group(per_rows: jax.Array, layout: Planes) -> jax.Array:
    """The inverse of `_per_rows`."""
    parts = 1 if layout.group_size == layout.k else layout.group_size // layout.rows
    return per_rows[: layout.k // layout.group_size * parts : parts, : layout.n]


def _per_row(per_rows: jax.Array, layout: Planes) -> jax.Array:
    """For each row of K."""
    return jnp.repeat(per_rows, layout.rows, axis=0)[: layout.k, : layout.n]


def _filled(array: jax.Array, rows: int, columns: int) -> jax.Array:
    return jnp.pad(array, ((0, rows - array.shape[0]), (0, columns - array.shape[1])))
