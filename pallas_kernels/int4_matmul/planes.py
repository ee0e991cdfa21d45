"""The runtime layout of the Triton kernels: codes in planes, so that unpacking a word moves nothing between threads.

K is cut into tiles of 128 rows, the last one padded with zeros. A tile of b-bit codes is `W = 4 b` rows of int32 words, and
code p of a word, counted from the lowest bits, belongs to plane p:

    row k = 128 t + W p + j   is in   word row W t + j,  bits [b p, b p + b)

So the rows of a plane are contiguous, in x too: a kernel reads one word, and multiplies each of its 32 / b codes with another
slice of x. A plane lies within one group, for groups have at least 32 rows.

An act-order becomes a permutation of K that is applied to x: groups are contiguous at runtime. Scales keep their dtype; zero
points become int8 differences from the middle of the grid. N is padded to a multiple of 64 with scales of zero.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp

from pallas_kernels.int4_matmul.runtime import RuntimeLayout
from pallas_kernels.packing import pack_codes, unpack_codes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planes(RuntimeLayout):
    """The layout of nibble or byte planes."""

    COLUMN_MULTIPLE: ClassVar[int] = 64

    @property
    def words(self) -> int:
        """Rows of words in a tile, which is also the rows of K in a plane."""
        return 4 * self.bits

    @property
    def planes(self) -> int:
        """Codes in a word."""
        return 32 // self.bits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RuntimeKernel:
    """A packed kernel in planes: what `int4_matmul_runtime` multiplies with. S is `layout.scale_count`."""

    qweight: jax.Array  # int32 [tiles * words, padded N]
    scales: jax.Array  # [S, padded N], of the file's dtype
    zeros: jax.Array | None  # int8 [S, padded N], zero points less 2^(bits-1); None for a symmetric grid
    row_order: jax.Array | None  # int32 [K], runtime row i is row row_order[i] of the file; None where they are the same
    layout: Planes = dataclasses.field(metadata={"static": True})

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape that the layout gives each array."""
        layout = self.layout
        of_scales = layout.scale_count, layout.padded_n
        words = layout.tiles * layout.words, layout.padded_n
        return {"qweight": words, "scales": of_scales, "zeros": of_scales, "row_order": (layout.k,)}


def to_runtime(
    qweight: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None = None,
    group_index: jax.Array | None = None,
    *,
    group_size: int,
    bits: int = 4,
) -> RuntimeKernel:
    """Converts a kernel from the file layout; `to_file` is the exact inverse.

    Args:
      qweight: int32 `[K*bits/32, N]`.
      scales: `[G, N]`.
      zeros: int32 `[G, N*bits/32]`, or None for a symmetric grid.
      group_index: int32 `[K]`, the group of each row (`g_idx` of the files), or None for contiguous groups; concrete, not traced.
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
    row_order = None
    if group_index is not None:
        sizes = jnp.bincount(group_index, length=groups)
        if not bool(jnp.all(sizes == layout.group_size)):
            advice = "multiply in the file layout (`int4_matmul`)"
            wanted = f"group_index must give every group {layout.group_size} rows"
            raise ValueError(f"{wanted}, found {sizes.tolist()}; {advice}")
        row_order = jnp.argsort(group_index, stable=True).astype(jnp.int32)
        codes_kn = codes_kn[row_order]
    runtime_zeros = None
    if zeros is not None:
        offset_gn = unpack_codes(zeros.T, bits).T - 2 ** (bits - 1)
        runtime_zeros = _from_groups(offset_gn.astype(jnp.int8), layout)
    return RuntimeKernel(
        qweight=to_planes(codes_kn, layout),
        scales=_from_groups(scales, layout),
        zeros=runtime_zeros,
        row_order=row_order,
        layout=layout,
    )


def to_file(kernel: RuntimeKernel) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    """Converts back: qweight, scales, zeros and group_index, as `to_runtime` takes them."""
    layout = kernel.layout
    codes_kn, group_index = codes_of(kernel.qweight, layout), None
    if kernel.row_order is not None:
        runtime_row_k = jnp.argsort(kernel.row_order)
        codes_kn, group_index = codes_kn[runtime_row_k], runtime_row_k.astype(jnp.int32) // layout.group_size
    zeros = None
    if kernel.zeros is not None:
        zero_gn = _to_groups(kernel.zeros, layout).astype(jnp.int32) + 2 ** (layout.bits - 1)
        zeros = pack_codes(zero_gn.T, layout.bits).T
    return pack_codes(codes_kn, layout.bits), _to_groups(kernel.scales, layout), zeros, group_index


def codes_of(qweight: jax.Array, layout: Planes) -> jax.Array:
    """The codes, int32 `[K, N]`, rows in the runtime's order."""
    words_twn = jax.lax.bitcast_convert_type(qweight, jnp.uint32).reshape(layout.tiles, 1, layout.words, -1)
    shift_p = (jnp.arange(layout.planes, dtype=jnp.uint32) * jnp.uint32(layout.bits)).reshape(1, -1, 1, 1)
    codes = (words_twn >> shift_p) & jnp.uint32(2**layout.bits - 1)
    return codes.astype(jnp.int32).reshape(layout.padded_k, -1)[: layout.k, : layout.n]


def expand(kernel: RuntimeKernel) -> jax.Array:
    """`scale * (code - zero)`, float32 `[K, N]`, rows in the runtime's order."""
    layout = kernel.layout
    offset_kn = codes_of(kernel.qweight, layout) - 2 ** (layout.bits - 1)
    if kernel.zeros is not None:
        offset_kn = offset_kn - _per_row(kernel.zeros, layout).astype(jnp.int32)
    return offset_kn.astype(jnp.float32) * _per_row(kernel.scales, layout).astype(jnp.float32)


def dequantize_runtime(kernel: RuntimeKernel) -> jax.Array:
    """`scale * (code - zero)`, float32 `[K, N]`, rows in the file's order."""
    w_kn = expand(kernel)
    return w_kn if kernel.row_order is None else w_kn[jnp.argsort(kernel.row_order)]


def obstacle(kernels: Sequence[RuntimeKernel]) -> str | None:
    """Why kernels cannot be concatenated to one; None where they can."""
    first = kernels[0]
    for other in kernels[1:]:
        facts = [(one.layout.k, one.layout.bits, one.layout.group_size, one.zeros is None) for one in (first, other)]
        if facts[0] != facts[1]:
            return f"fused kernels must agree in (K, bits, group_size, symmetric), found {facts[0]} and {facts[1]}"
        if (first.row_order is None) != (other.row_order is None) or (
            first.row_order is not None and other.row_order is not None and not bool(jnp.all(first.row_order == other.row_order))
        ):
            return "fused kernels must have the same order of rows: x is permuted once for all of them"
    return None


def fuse(kernels: Sequence[RuntimeKernel]) -> RuntimeKernel:
    """Concatenates the columns of kernels that read the same x: one product then gives the outputs of all, in sequence.

    Raises:
      ValueError: they differ in K, width, groups, in having zero points, or in their order of rows.
    """
    if reason := obstacle(kernels):
        raise ValueError(reason)
    first = kernels[0]
    layout = dataclasses.replace(first.layout, n=sum(kernel.layout.n for kernel in kernels))

    def concatenated(parts: Sequence[jax.Array]) -> jax.Array:
        wide = jnp.concatenate([part[:, : kernel.layout.n] for part, kernel in zip(parts, kernels, strict=True)], axis=1)
        return _padded(wide, wide.shape[0], layout.padded_n)

    zeros = [kernel.zeros for kernel in kernels if kernel.zeros is not None]
    return RuntimeKernel(
        qweight=concatenated([kernel.qweight for kernel in kernels]),
        scales=concatenated([kernel.scales for kernel in kernels]),
        zeros=concatenated(zeros) if zeros else None,
        row_order=first.row_order,
        layout=layout,
    )


def to_planes(codes_kn: jax.Array, layout: Planes) -> jax.Array:
    """Codes `[K, N]`, rows in the runtime's order, as words."""
    padded = _padded(codes_kn.astype(jnp.uint32), layout.padded_k, layout.padded_n)
    tiles = padded.reshape(layout.tiles, layout.planes, layout.words, layout.padded_n)
    words = jnp.zeros((layout.tiles, layout.words, layout.padded_n), jnp.uint32)
    for plane in range(layout.planes):
        words = words | tiles[:, plane] << jnp.uint32(layout.bits * plane)
    return jax.lax.bitcast_convert_type(words, jnp.int32).reshape(-1, layout.padded_n)


def _from_groups(part_gn: jax.Array, layout: Planes) -> jax.Array:
    """From one row for each group of the file to the runtime's rows of scales."""
    parts = 1 if layout.group_size == layout.k else layout.group_size // layout.scale_rows
    return _padded(jnp.repeat(part_gn, parts, axis=0), layout.scale_count, layout.padded_n)


def _to_groups(part_sn: jax.Array, layout: Planes) -> jax.Array:
    """The inverse of `_from_groups`."""
    parts = 1 if layout.group_size == layout.k else layout.group_size // layout.scale_rows
    return part_sn[: layout.k // layout.group_size * parts : parts, : layout.n]


def _per_row(part_sn: jax.Array, layout: Planes) -> jax.Array:
    """For each row of K."""
    return jnp.repeat(part_sn, layout.scale_rows, axis=0)[: layout.k, : layout.n]


def _padded(array: jax.Array, rows: int, columns: int) -> jax.Array:
    return jnp.pad(array, ((0, rows - array.shape[0]), (0, columns - array.shape[1])))
