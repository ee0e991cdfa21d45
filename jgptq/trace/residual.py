"""Which value a linear's output is added to: the residual stream."""

import dataclasses

from jgptq.trace.layout import Layout
from jgptq.trace.linears import Contents, Linear
from jgptq.trace.program import Equation, Program


@dataclasses.dataclass(frozen=True)
class Residual:
    """What a linear's output is added to, known before the linear runs."""

    value: int
    y_tn: Layout  # from the value to [T, N], features in the order of the linear's


def residual_of(program: Program, contents: Contents, linear: Linear) -> Residual | None:
    """What a linear's output is added to, straight away or after its bias; None where that is not known before it runs.

    Args:
      program: the program.
      contents: what it holds.
      linear: one of its linears.
    """
    value, layout = linear.result, Layout(tuple(program.avals[linear.result].shape))
    while (equation := _only_reader(program, value)) is not None:
        name = equation.primitive.name
        others = [other for other in equation.inputs if other != value]
        made = equation.outputs[0]
        if name in ("add", "add_any") and len(others) == 1:
            other = others[0]
            if not program.is_fixed(other):
                assert isinstance(other, int)
                return Residual(other, layout.undone().then(linear.y_tn)) if _known(program, other, linear.position) else None
        elif made in contents.views:
            before = Layout(tuple(program.avals[value].shape))
            shape = tuple(program.avals[made].shape)
            permutation = equation.params.get("permutation") if name == "transpose" else None
            layout = layout.then(before.reshaped(*shape) if permutation is None else before.transposed(*permutation))
        else:
            return None
        value = made
    return None


def _only_reader(program: Program, value: int) -> Equation | None:
    """The equation that reads a value, if there is exactly one."""
    readers = [equation for equation in program.equations if value in equation.inputs]
    return readers[0] if len(readers) == 1 and value not in program.outputs else None


def _known(program: Program, value: int, position: int) -> bool:
    """Whether a value is there before the equation at a position runs."""
    return all(value not in equation.outputs for equation in program.equations[position:])
