"""What enters and leaves the body of a loop over layers, in one stream of values."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Literal

from jgptq.models.memory import to_device
from jgptq.trace.linears import Loop
from jgptq.trace.program import Value, Values, only
from jgptq.trace.segments import LayerLoop


def first_carries(loop: Loop, batch: Values, known: Values) -> list[Any]:
    """What the first layer is handed.

    Args:
      loop: the loop.
      batch: values outside of the loop that depend on the batch.
      known: those that do not.
    """
    inputs = loop.equation.inputs[loop.consts : loop.consts + loop.carries]
    return [_value(outer, batch, known) for outer in inputs]


def layer_weights(loop: Loop, layer: int, weights: Values, known: Values) -> dict[int, Any]:
    """The values of the body that do not depend on the batch, for one layer.

    Args:
      loop: the loop.
      layer: which layer.
      weights: the leaves of the tree outside of the loop.
      known: other values outside of the loop that do not depend on the batch.
    """
    inner = dict(loop.body.constants)
    for index, (outer, value) in enumerate(zip(loop.equation.inputs, loop.body.inputs, strict=True)):
        if (view := loop.stacks.get(value)) is not None:
            inner[value] = cast(to_device(weights[view.root][layer]), view.dtypes)
        elif loop.body.is_fixed(value):
            whole = _value(outer, known)
            inner[value] = whole if index < loop.consts else whole[layer]
    return inner


def layer_values(loop: Loop, layer: int, batch: Values, carried: Sequence[Any]) -> dict[int, Any]:
    """The values of a batch as the body begins, for one layer.

    Args:
      loop: the loop.
      layer: which layer.
      batch: values outside of the loop.
      carried: what the layer before hands on.
    """
    inner = {}
    for index, (outer, value) in enumerate(zip(loop.equation.inputs, loop.body.inputs, strict=True)):
        if loop.consts <= index < loop.consts + loop.carries:
            inner[value] = carried[index - loop.consts]
        elif not loop.body.is_fixed(value):
            whole = _value(outer, batch)
            inner[value] = whole if index < loop.consts else whole[layer]
    return inner


def handed_on(loop: Loop, batch: Values, made: Values, weights: Values) -> list[Any]:
    """What a layer hands to the next one.

    Args:
      loop: the loop.
      batch: the values of a batch as the body ends.
      made: outputs of the body that do not depend on the batch.
      weights: the values of the body that do not depend on the batch.
    """
    return [_value(inner, batch, made, weights) for inner in loop.body.outputs[: loop.carries]]


def layer_outputs(action: LayerLoop, batch: Values, made: Values, weights: Values) -> dict[int, Any]:
    """A layer's part of the outputs that are stacked, by the number of the output; only of those that are needed later.

    Args: those of `handed_on`.
    """
    loop = action.loop
    stacked = zip(loop.equation.outputs[loop.carries :], loop.body.outputs[loop.carries :], strict=True)
    return {outer: _value(inner, batch, made, weights) for outer, inner in stacked if outer in action.keeps}


def after_loop(action: LayerLoop, batch: Values, carried: Sequence[Any], layers: Sequence[Values]) -> dict[int, Any]:
    """The values of a batch after a loop.

    Args:
      action: the loop.
      batch: its values before.
      carried: what the last layer hands on.
      layers: `layer_outputs` of every layer, in the order of the stack.
    """
    last = dict(zip(action.loop.carried, carried, strict=True))
    stacks = {number: jnp.stack([outputs[number] for outputs in layers]) for number in layers[0]}
    return only(action.keeps, {**batch, **last, **stacks})


def cast(array: Any, dtypes: Sequence[Any]) -> Any:
    """The array in one dtype after the other."""
    for dtype in dtypes:
        array = array.astype(dtype)
    return array


def _value(value: Value, *sources: Values) -> Any:
    """A value from the first source that has it."""
    if isinstance(value, Literal):
        return jnp.asarray(value.val, getattr(value.aval, "dtype", None))
    return next(source[value] for source in sources if value in source)
