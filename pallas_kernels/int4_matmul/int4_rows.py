"""The runtime layout of the Mosaic GPU kernel, for Hopper: int4 codes, the kernel transposed.

Row n holds the codes of output column n less 8, two to a byte, `[padded N, padded K]`: the left operand of wgmma, which takes it
from registers, where int4 becomes bfloat16 in a few operations on whole words. It is made from `RuntimeKernel`, whose scales,
zero points and order of rows it keeps.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from pallas_kernels.int4_matmul.planes import Planes, RuntimeKernel, codes_of, to_planes
from pallas_kernels.int4_matmul.runtime import RuntimeLayout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int4Rows(RuntimeLayout):
    """The layout of int4 rows.

    Raises:
      ValueError: as `RuntimeLayout`, or codes of another width.
    """

    COLUMN_MULTIPLE: ClassVar[int] = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits != 4:
            raise ValueError(f"int4 rows hold codes of 4 bits, found {self.bits}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Int4RowsKernel:
    """A packed kernel as int4 rows: what `int4_matmul_runtime` multiplies with on backend "mosaic". S is `layout.scale_count`."""

    codes: jax.Array  # int4 [padded N, padded K], codes less 8
    scales: jax.Array  # [S, padded N], of the file's dtype
    zeros: jax.Array | None  # int8 [S, padded N], zero points less 8; None for a symmetric grid
    row_order: jax.Array | None  # int32 [K], runtime row i is row row_order[i] of the file; None where they are the same
    layout: Int4Rows = dataclasses.field(metadata={"static": True})

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape that the layout gives each array."""
        layout = self.layout
        of_scales = layout.scale_count, layout.padded_n
        codes = layout.padded_n, layout.padded_k
        return {"codes": codes, "scales": of_scales, "zeros": of_scales, "row_order": (layout.k,)}


def to_int4_rows(kernel: RuntimeKernel) -> Int4RowsKernel:
    """Converts a 4-bit kernel; `from_int4_rows` is the exact inverse.

    Raises:
      ValueError: codes of another width.
    """
    layout = Int4Rows(**dataclasses.asdict(kernel.layout))
    codes_nk = (codes_of(kernel.qweight, kernel.layout) - 8).astype(jnp.int4).T
    padding = (0, layout.padded_n - layout.n), (0, layout.padded_k - layout.k)
    return Int4RowsKernel(
        codes=jnp.pad(codes_nk, padding),
        scales=_columns(kernel.scales, layout),
        zeros=None if kernel.zeros is None else _columns(kernel.zeros, layout),
        row_order=kernel.row_order,
        layout=layout,
    )


def from_int4_rows(kernel: Int4RowsKernel) -> RuntimeKernel:
    """Converts back."""
    layout = Planes(**dataclasses.asdict(kernel.layout))
    codes_kn = kernel.codes.T[: layout.k, : layout.n].astype(jnp.int32) + 8
    return RuntimeKernel(
        qweight=to_planes(codes_kn, layout),
        scales=_columns(kernel.scales, layout),
        zeros=None if kernel.zeros is None else _columns(kernel.zeros, layout),
        row_order=kernel.row_order,
        layout=layout,
    )


def _columns(part_sn: jax.Array, layout: RuntimeLayout) -> jax.Array:
    """Scales or zero points with the padding of a layout."""
    return jnp.pad(part_sn[:, : layout.n], ((0, 0), (0, layout.padded_n - layout.n)))
