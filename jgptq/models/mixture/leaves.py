"""Leaves of linears that are stacked over experts.

On a device the kernels of E experts are one array `[E, K, N]`, or one stack of packed tensors. Files hold them one by one, so
that a stack which was read from a file is a tuple of views until it is moved to a device.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jgptq.errors import CheckpointError
from jgptq.models.packed import PackedTensor
from jgptq.notation import Array, Float
from pallas_kernels.packing import pack_codes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerExpert:
    """A leaf of stacked linears whose experts lie apart, as views of files for example."""

    parts: tuple[Any, ...]  # of each expert: an array, or a `PackedTensor`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedExperts:
    """The packed kernels of all experts, alike in bits, groups and grid."""

    stack: PackedTensor  # each of its arrays with a leading axis E

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, K, N)."""
        return self.stack.qweight.shape[0], *self.stack.shape

    @property
    def scales(self) -> Array:
        """`[E, G, N]`."""
        return self.stack.scales

    def with_scales(self, scales: Array) -> "PackedExperts":
        """The same codes on other scales."""
        return PackedExperts(dataclasses.replace(self.stack, scales=scales))

    def dequantize(self) -> Float[jax.Array, "E K N"]:
        """The float32 kernels, rows as in the file."""
        return jax.vmap(PackedTensor.dequantize)(self.stack)

    def expert(self, index: int) -> PackedTensor:
        """The kernel of one expert."""
        return jax.tree.map(lambda leaf: leaf[index], self.stack)


def stack_parts(leaf: PerExpert) -> np.ndarray | PackedExperts:
    """The leaf as one array, or one stack of packed tensors, in host memory.

    Raises:
      CheckpointError: packed experts that differ in bits or group size.
    """
    if not isinstance(leaf.parts[0], PackedTensor):
        return np.stack([np.asarray(part) for part in leaf.parts])
    return PackedExperts(jax.tree.map(lambda *parts: np.stack([np.asarray(part) for part in parts]), *_alike(leaf.parts)))


def _alike(parts: Sequence[PackedTensor]) -> list[PackedTensor]:
    """The tensors with zero points and indices of groups in all of them, where some have them."""
    if kinds := {(part.bits, part.group_size, part.shape) for part in parts} - {
        (parts[0].bits, parts[0].group_size, parts[0].shape)
    }:
        raise CheckpointError(
            f"experts of one layer must have the same bits, group size and shape; found {(parts[0].bits, parts[0].group_size)} "
            f"and {', '.join(map(str, sorted(kinds)))}; quantize them with the same settings"
        )
    if any(part.zeros is not None for part in parts):
        parts = [dataclasses.replace(part, zeros=_zeros(part)) for part in parts]
    if any(part.group_index is not None for part in parts):
        parts = [dataclasses.replace(part, group_index=_group_index(part)) for part in parts]
    return list(parts)


def _zeros(part: PackedTensor) -> Array:
    if part.zeros is not None:
        return part.zeros
    middle_ng = jnp.full(part.scales.shape[::-1], 2 ** (part.bits - 1), jnp.int32)
    return np.asarray(pack_codes(middle_ng, part.bits).T)


def _group_index(part: PackedTensor) -> Array:
    if part.group_index is not None:
        return part.group_index
    k, groups = part.shape[0], part.scales.shape[0]
    return (np.arange(k) // (k // groups)).astype(np.int32)


def expert_part(leaf: Any, index: int) -> Any:
    """One expert's part of a stacked leaf: an array, shapes alone, or a `PackedTensor`."""
    if isinstance(leaf, PerExpert):
        return leaf.parts[index]
    if isinstance(leaf, PackedExperts):
        return leaf.expert(index)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
    return leaf[index]


def dense(leaf: Any, dtype: jnp.dtype) -> jax.Array:
    """All experts' parts of a leaf as one array of this dtype, in which packed kernels are expanded."""
    if isinstance(leaf, PerExpert):
        parts = [part.dequantize() if isinstance(part, PackedTensor) else jnp.asarray(part) for part in leaf.parts]
        return jnp.stack(parts).astype(dtype)
    return (leaf.dequantize() if isinstance(leaf, PackedExperts) else jnp.asarray(leaf)).astype(dtype)
