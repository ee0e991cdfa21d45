"""Copies of modules: with the same leaves, or with leaves moved to a device without keeping pages of mapped files in memory."""

import mmap
from typing import TypeVar

import jax
import numpy as np

Tree = TypeVar("Tree")


def copy_module(module: Tree) -> Tree:
    """A module of the same structure that shares every leaf: what is replaced in the copy stays in the original."""
    return jax.tree.map(lambda leaf: leaf, module)


def abstract(tree: Tree) -> Tree:
    """A tree of the same structure that holds shapes and dtypes in place of arrays."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def to_device(tree: Tree) -> Tree:
    """Copies every leaf to the default device; pages of mapped files that were read for it are given back to the system.

    Args:
      tree: a pytree of arrays, a module for example; leaves may be views of a mapped file.

    Returns:
      The same tree with device arrays.
    """
    return jax.tree.map(_leaf_to_device, tree)


def _leaf_to_device(leaf: jax.Array | np.ndarray) -> jax.Array:
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
