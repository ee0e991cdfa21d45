"""A packed array that stands in for a float one of any shape, in a model that is not ours."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from flax.core import meta

from jgptq.models.packed import PackedTensor
from jgptq.trace.layout import Layout

Tree = TypeVar("Tree")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["packed"], meta_fields=["layout", "dtype"])
@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedArray(meta.AxisMetadata[Any]):
    """The weight of a linear as integer codes, in place of the float array that it was.

    It is a pytree node, so that `jit` takes it and `scan` slices its layers, and JAX's functions read it as the float array: they
    call `__jax_array__`. Flax's Linen opens it as one of its boxes where a module asks for the parameter. With `w` the array and
    `layout` the reshapes and transpositions between a layer of it and a matrix `[K, N]`:

        layout.forward(w) == packed.dequantize(), in the dtype of w

    Args:
      packed: the codes; with leading axes for stacked layers, all of its arrays have them.
      layout: from a layer to its matrix.
      dtype: of the float array.
    """

    packed: PackedTensor
    layout: Layout
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the float array."""
        return (*self.packed.qweight.shape[:-2], *self.layout.shape)

    @property
    def ndim(self) -> int:
        """Axes of the float array."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Entries of the float array."""
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return self.packed.nbytes

    def dequantize(self) -> jax.Array:
        """The float array."""

        def one(packed: PackedTensor) -> jax.Array:
            return self.layout.backward(packed.dequantize()).astype(self.dtype)

        for _ in self.packed.qweight.shape[:-2]:
            one = jax.vmap(one)
        return one(self.packed)

    def __jax_array__(self) -> jax.Array:
        return self.dequantize()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.dequantize(), dtype)

    def astype(self, dtype: Any) -> jax.Array:
        """The float array in another dtype."""
        return self.dequantize().astype(dtype)

    def reshape(self, *shape: Any) -> jax.Array:
        """The float array, reshaped."""
        return self.dequantize().reshape(*shape)

    def transpose(self, *axes: Any) -> jax.Array:
        """The float array, transposed."""
        return self.dequantize().transpose(*axes)

    def swapaxes(self, first: int, second: int) -> jax.Array:
        """The float array with two axes exchanged."""
        return self.dequantize().swapaxes(first, second)

    @property
    def T(self) -> jax.Array:
        """The float array, its axes reversed."""
        return self.dequantize().T

    def __getitem__(self, index: Any) -> jax.Array:
        return self.dequantize()[index]

    def __matmul__(self, other: Any) -> jax.Array:
        return self.dequantize() @ other

    def __rmatmul__(self, other: Any) -> jax.Array:
        return other @ self.dequantize()

    def unbox(self) -> jax.Array:
        """The float array, where a Linen module asks for its parameter."""
        return self.dequantize()

    def replace_boxed(self, val: Any) -> Any:
        """The value itself: what is written is not packed."""
        return val

    def add_axis(self, index: int, params: dict[Any, Any]) -> "PackedArray":
        """Itself: its axes have no names."""
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "PackedArray":
        """Itself: its axes have no names."""
        return self


def dequantized(tree: Tree) -> Tree:
    """The tree with float arrays, in their original dtypes, in place of packed ones: for functions that do not take these."""
    is_packed = lambda leaf: isinstance(leaf, PackedArray)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf.dequantize() if is_packed(leaf) else leaf, tree, is_leaf=is_packed)


def stacked(layers: Sequence[PackedTensor], lengths: tuple[int, ...]) -> PackedTensor:
    """Packed layers as one tensor whose arrays have the leading axes `lengths`; of a single layer with no lengths, itself."""

    def stack(*parts: Any) -> np.ndarray:
        return np.stack([np.asarray(part) for part in parts]).reshape(*lengths, *parts[0].shape)

    return jax.tree.map(stack, *layers)
