"""Copies of modules: with the same leaves, or with leaves moved to a device without keeping pages of mapped files in memory."""

import mmap
from typing import Any, TypeVar

import jax
import numpy as np

from jgptq.models.mixture.leaves import PerExpert, stack_parts

Tree = TypeVar("Tree")


def copy_module(module: Tree) -> Tree:
    """A module of the same structure that shares every leaf: what is replaced in the copy stays in the original."""
    return jax.tree.map(lambda leaf: leaf, module)


def abstract(tree: Tree) -> Tree:
    """What `to_device` gives, with shapes and dtypes in place of arrays."""

    def shape_of(leaf: Any) -> Any:
        if isinstance(leaf, PerExpert):
            one = leaf.parts[0]  # float ones alone are asked for: packed experts are not quantized again
            return jax.ShapeDtypeStruct((len(leaf.parts), *one.shape), one.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

    return jax.tree.map(shape_of, tree, is_leaf=_lies_apart)


def to_device(tree: Tree) -> Tree:
    """Copies every leaf to the default device; pages of mapped files that were read for it are given back to the system.

    Args:
      tree: a pytree of arrays, a module for example; leaves may be views of a mapped file.

    Returns:
      The same tree with device arrays.
    """
    return jax.tree.map(_leaf_to_device, tree, is_leaf=_lies_apart)


def _lies_apart(leaf: Any) -> bool:
    return isinstance(leaf, PerExpert)


def _leaf_to_device(leaf: Any) -> Any:
    if isinstance(leaf, PerExpert):
        stacked = jax.device_put(stack_parts(leaf))
        for view in jax.tree.leaves(leaf):
            if isinstance(view, np.memmap):
                release(view)
        return stacked
    if not isinstance(leaf, np.memmap):
        return jax.device_put(leaf)
    # jax may use an aligned host buffer without a copy; a mapped file must be copied, because its pages are released next.
    device = jax.device_put(np.array(leaf, copy=True, order="C"))
    release(leaf)
    return device


def release(leaf: np.memmap) -> None:
    """Tells the system that the pages under a view of a mapped file are not needed now; reading it again maps them again."""
    mapping: mmap.mmap | None = getattr(leaf, "_mmap", None)
    if mapping is None or leaf.size == 0 or not hasattr(mapping, "madvise"):
        return
    origin = np.frombuffer(mapping, np.uint8).__array_interface__["data"][0]
    low, high = np.lib.array_utils.byte_bounds(leaf)
    first = (low - origin) // mmap.PAGESIZE * mmap.PAGESIZE
    mapping.madvise(mmap.MADV_DONTNEED, first, high - origin - first)
