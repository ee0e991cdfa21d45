"""Runs segments: every batch through the same equations, with the quantized weights and, where wanted, with the float ones."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from jgptq.models.memory import to_device
from jgptq.solver import ONE_DEVICE
from jgptq.solver.statistics.drift import StageSums
from jgptq.trace.program import Equation, Value, Values, only
from jgptq.trace.segments import Group, Segment


class Streams(NamedTuple):
    """The same in the quantized model and in the float one: values of a program as a rule."""

    quantized: Any
    float_: Any  # None where nothing reads the float model


def both(function: Callable[..., Any], *streams: Streams) -> Streams:
    """The results of a function in both models."""
    return Streams(*(None if sides[0] is None else function(*sides) for sides in zip(*streams, strict=True)))


def evaluate(equations: Iterable[Equation], values: Values) -> dict[int, Any]:
    """The values, and those that the equations make of them; call it within jit."""
    known = dict(values)

    def read(value: Value) -> Any:
        return value.val if isinstance(value, Literal) else known[value]

    for equation in equations:
        primitive = equation.primitive
        made = primitive.bind(*map(read, equation.inputs), **primitive.get_bind_params(equation.params))
        known.update(zip(equation.outputs, made if primitive.multiple_results else [made], strict=True))
    return known


class Runner:
    """Compiles segments, those that compute the same only once: the layers of most models do."""

    def __init__(self) -> None:
        self._by_segment: dict[tuple[Segment, bool], Any] = {}
        self._by_text: dict[str, Any] = {}

    def run(self, segment: Segment, fixed: Streams, batches: list[Streams], *, drift: bool) -> StageSums | None:
        """Moves every batch through a segment, in place, and sums over what the linears after it read.

        Args:
          segment: the segment.
          fixed: weights and constants.
          batches: as they enter the segment; as they leave it, afterwards.
          drift: whether the drift from the float model is summed as well.

        Returns:
          The sums; None where the segment observes nothing.
        """
        total = None if segment.observes is None else _empty_sums(segment.observes, drift)
        weights = both(partial(_taken, segment.fixed), fixed)
        for index, batch in enumerate(batches):
            given = both(lambda stream: [], batch)
            if segment.gives or total is not None:
                values = both(partial(_taken, segment.takes), batch)
                given, total = self._compiled(segment, weights, values, total)(weights, values, total)
            batches[index] = both(partial(_after, segment), batch, given)
        return total

    def fixed_values(self, segment: Segment, fixed: Streams) -> Streams:
        """The values that a segment makes of weights and constants alone."""
        holder = [both(lambda weights: {}, fixed)]
        self.run(segment, fixed, holder, drift=False)
        return both(lambda weights, made: {value: weights[value] for value in segment.fixed} | made, fixed, holder[0])

    def _compiled(self, segment: Segment, weights: Streams, values: Streams, total: StageSums | None) -> Any:
        arguments = (weights, values, total)
        key = (segment, values.float_ is None)
        if key not in self._by_segment:
            # Arguments are lists in the order of the numbers, so that equal text is the same program whatever the numbers are.
            program = jax.jit(_function(segment), donate_argnums=2, keep_unused=True).lower(*arguments)
            text = program.as_text()
            if text not in self._by_text:
                self._by_text[text] = program.compile()
            self._by_segment[key] = self._by_text[text]
        return self._by_segment[key]


def _taken(numbers: Iterable[int], stream: Values) -> list[Any]:
    return [to_device(stream[number]) for number in numbers]


def _after(segment: Segment, stream: Values, given: Sequence[Any]) -> dict[int, Any]:
    """The values of a batch that are needed after a segment."""
    return only(segment.keeps, stream) | dict(zip(segment.gives, given, strict=True))


def _function(segment: Segment) -> Callable[[Streams, Streams, StageSums | None], tuple[Streams, StageSums | None]]:
    """A segment as a function of its weights, a batch's values, and sums so far."""

    def through(weights: list[Any], values: list[Any]) -> dict[int, Any]:
        return evaluate(segment.equations, dict(zip(segment.fixed + segment.takes, weights + values, strict=True)))

    def function(weights: Streams, values: Streams, total: StageSums | None) -> tuple[Streams, StageSums | None]:
        known = both(through, weights, values)
        if total is not None and segment.observes is not None:
            total = _accumulate(segment.observes, total, known)
        return both(lambda stream: [stream[number] for number in segment.gives], known), total

    return function


def _empty_sums(group: Group, drift: bool) -> StageSums:
    k, n = group.linears[0].shape
    return ONE_DEVICE.empty_sums(k, None if group.residual is None else n, drift=drift)


def _accumulate(group: Group, total: StageSums, known: Streams) -> StageSums:
    """Adds what the linears of a group read, and what the residual stream lost before their output is added to it."""
    linear, residual = group.linears[0], group.residual
    h_tk = linear.x_tk.forward(known.quantized[linear.reads])
    if total.drift is None:
        return ONE_DEVICE.accumulate(total, h_tk)
    lost_tn = None
    if residual is not None:
        streams = both(lambda stream: residual.y_tn.forward(stream[residual.value]).astype(jnp.float32), known)
        lost_tn = streams.float_ - streams.quantized
    return ONE_DEVICE.accumulate(total, h_tk, linear.x_tk.forward(known.float_[linear.reads]), lost_tn)
