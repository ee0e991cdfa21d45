"""The runtime layout of the kernels for Hopper's own lowering: int4 codes, row by row of the transposed kernel.

Row n holds the codes of output column n less 8, two to a byte, `[padded N, padded K]`: the left operand of wgmma, which takes it
from registers, where int4 becomes bfloat16 in a few operations on whole words. Scales, zero points, order and what is filled up
are those of `pallas_kernels.int4_matmul.planes`, from which it is made.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.int4_matmul.planes import Planes, RuntimeKernel, codes_of, expanded, to_planes

COLUMNS = 128
"""Output columns are filled up to a multiple of this."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows(Planes):
    """The layout of int4 rows; sizes, version and groups as in `Planes`.

    Raises:
      ValueError: as `Planes`, or codes of another width.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits != 4:
            raise ValueError(f"rows hold codes of 4 bits, found {self.bits}")

    @property
    def filled_n(self) -> int:
        """Out-features, filled up."""
        return -(-self.n // COLUMNS) * COLUMNS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RowsKernel:
    """A packed kernel as int4 rows."""

    codes: jax.Array  # int4 [N filled up, padded K], codes less 8
    scales: jax.Array  # as in the `RuntimeKernel`, columns filled up
    zeros: jax.Array | None  # likewise
    order: jax.Array | None
    layout: Rows = dataclasses.field(metadata={"static": True})


def to_rows(kernel: RuntimeKernel) -> RowsKernel:
    """Converts a 4-bit kernel; `from_rows` is the exact inverse.

    Raises:
      ValueError: codes of another width.
    """
    layout = Rows(**dataclasses.asdict(kernel.layout))
    codes_nk = (codes_of(kernel.qweight, layout) - 8).astype(jnp.int4).T
    filled = ((0, layout.filled_n - layout.n), (0, layout.padded_k - layout.k))
    return RowsKernel(
        codes=jnp.pad(codes_nk, filled),
        scales=_columns(kernel.scales, layout),
        zeros=None if kernel.zeros is None else _columns(kernel.zeros, layout),
        order=kernel.order,
        layout=layout,
    )


def from_rows(kernel: RowsKernel) -> RuntimeKernel:
    """Converts back."""
    layout = Planes(**dataclasses.asdict(kernel.layout))
    codes_kn = kernel.codes.T[: layout.k, : layout.n].astype(jnp.int32) + 8
    rows = -(-layout.padded_k // layout.rows)
    narrow = ((0, 0), (0, layout.padded_n - layout.n))
    return RuntimeKernel(
        qweight=to_planes(codes_kn, layout),
        scales=jnp.pad(kernel.scales[:rows, : layout.n], narrow),
        zeros=None if kernel.zeros is None else jnp.pad(kernel.zeros[:rows, : layout.n], narrow),
        order=kernel.order,
        layout=layout,
    )


def expanded_rows(kernel: RowsKernel) -> jax.Array:
    """`scale * (code - zero)`, float32 `[K, N]`, rows in the runtime's order."""
    return expanded(from_rows(kernel))


def _columns(per_row: jax.Array, layout: Rows) -> jax.Array:
    return jnp.pad(per_row[:, : layout.n], ((0, 0), (0, layout.filled_n - layout.n)))
