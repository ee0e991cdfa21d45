"""What is traced: an NNX module, a Linen module with its parameters, or a function of a tree, all as a function of arrays."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.tree_util import GetAttrKey, keystr

from jgptq.errors import CalibrationError, ConfigError
from jgptq.trace.linears import Contents, Uses, find_linears
from jgptq.trace.program import Program, program_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A function of the arrays of a tree, and of a batch."""

    names: tuple[str, ...]  # of the arrays, their paths in the tree with dots
    arrays: tuple[Any, ...]
    function: Callable[[Sequence[Any], Any], Any]
    rebuild: Callable[[Sequence[Any]], Any]  # the tree with other leaves in place of the arrays


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traced:
    """A model's computation on a batch."""

    program: Program
    contents: Contents
    uses: Uses  # what happens to each array


def model_of(params: Any, apply: Callable[[Any, Any], Any] | None) -> Model:
    """The model that a caller describes.

    Args:
      params: an NNX module, a pair of a Linen module and its variables or parameters, or a pytree of arrays.
      apply: the function of `params` and a batch; may be None for a module, which is then called on the batch.

    Raises:
      ConfigError: a tree without a function, or without a float array.
    """
    if isinstance(params, nnx.Module):
        graph, state = nnx.split(params)
        call = apply or (lambda module, batch: module(batch))
        return _of_tree(state, lambda tree, batch: call(nnx.merge(graph, tree), batch), lambda tree: nnx.merge(graph, tree))
    if _is_linen(params):
        from flax.core import meta

        module, variables = params[0], meta.unbox(params[1])
        call = apply or _linen_call
        return _of_tree(variables, lambda tree, batch: call((module, tree), batch), lambda tree: (module, tree))
    if apply is None:
        expected = "an NNX module, a pair (Linen module, params), or apply=fn with a tree of arrays"
        raise ConfigError(f"expected {expected}, found {type(params)}; give apply=fn, a function of the tree and a batch")
    return _of_tree(params, apply, lambda tree: tree)


def _is_linen(params: Any) -> bool:
    from flax import linen

    return isinstance(params, tuple) and len(params) == 2 and isinstance(params[0], linen.Module)


def _linen_call(pair: Any, batch: Any) -> Any:
    """A Linen module's `apply`, on its variables or on its parameters alone."""
    module, variables = pair
    return module.apply(variables if "params" in variables else {"params": variables}, batch)


def _of_tree(tree: Any, call: Callable[[Any, Any], Any], finish: Callable[[Any], Any]) -> Model:
    """The model of a tree; leaves that are no arrays stay as they are."""
    named, structure = jax.tree_util.tree_flatten_with_path(tree)
    leaves = [leaf for _, leaf in named]
    places = [index for index, leaf in enumerate(leaves) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]
    if not any(is_float(leaves[index]) for index in places):
        raise ConfigError("the tree holds no float array, so there is nothing to quantize; see docs/any_model.md")

    def filled(arrays: Sequence[Any]) -> Any:
        given = dict(zip(places, arrays, strict=True))
        return jax.tree.unflatten(structure, [given.get(index, leaf) for index, leaf in enumerate(leaves)])

    return Model(
        names=tuple(_dotted(named[index][0]) for index in places),
        arrays=tuple(leaves[index] for index in places),
        function=lambda arrays, batch: call(filled(arrays), batch),
        rebuild=lambda arrays: finish(filled(arrays)),
    )


def _dotted(path: Sequence[Any]) -> str:
    """A path in a tree with dots, without the `value` that NNX ends its paths with."""
    if len(path) > 1 and path[-1] == GetAttrKey("value"):
        path = path[:-1]
    return keystr(tuple(path), simple=True, separator=".")


def is_float(leaf: Any) -> bool:
    """Whether an array holds floating point numbers."""
    return bool(jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating))


_VALUE_ERRORS = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


def trace(model: Model, batch: Any) -> Traced:
    """Traces a model on a batch and finds its linears.

    Args:
      model: the model.
      batch: a tree of arrays; only shapes are looked at.

    Raises:
      ConfigError: Python control flow or indices depend on values.
    """
    try:
        jaxpr = jax.make_jaxpr(model.function)(list(model.arrays), batch)
    except _VALUE_ERRORS as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"the function cannot be traced, because what it does depends on the values of its arrays: {reason} Use jnp.where or "
            "jax.lax.cond in place of `if`, or make what decides a constant of the function"
        ) from error
    count = len(model.arrays)
    program = program_of(jaxpr, [index < count for index in range(len(jaxpr.in_avals))])
    uses: Uses = {leaf: [] for leaf in range(count)}
    floats = {program.inputs[leaf]: leaf for leaf in range(count) if is_float(model.arrays[leaf])}
    return Traced(program=program, contents=find_linears(program, floats, uses), uses=uses)


def cut_samples(calib: Any, batch_size: int | None, *, tokens_at_once: int) -> list[Any]:
    """A tree of arrays cut along its first axis into batches of one size.

    Args:
      calib: arrays whose first axis counts samples.
      batch_size: samples in a batch; made smaller until it divides the samples. None for about `tokens_at_once` tokens, where
        the second axis of the first array counts tokens.
      tokens_at_once: see there.

    Raises:
      ConfigError: batch_size is less than one.
      CalibrationError: no arrays, or arrays that differ in the number of samples.
    """
    leaves, structure = jax.tree.flatten(calib)
    shapes = [tuple(np.shape(leaf)) for leaf in leaves]
    if not leaves or not all(shape and shape[0] for shape in shapes) or len({shape[0] for shape in shapes}) > 1:
        found = ", ".join(str(list(shape)) for shape in shapes) or "none"
        raise CalibrationError(f"calib must be arrays whose first axes count the same samples, found {found}; stack your samples")
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, found {batch_size}")
    samples = shapes[0][0]
    length = shapes[0][1] if len(shapes[0]) > 1 else 1
    limit = max(1, tokens_at_once // max(1, length)) if batch_size is None else batch_size
    rows = max(size for size in range(1, min(limit, samples) + 1) if samples % size == 0)
    return [jax.tree.unflatten(structure, [leaf[start : start + rows] for leaf in leaves]) for start in range(0, samples, rows)]
