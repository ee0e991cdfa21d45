"""A traced computation as a flat list of equations on numbered values.

Calls (`jit`, `remat`, `custom_jvp`, `custom_vjp`, closed calls) are replaced by what they call: without derivatives they compute
the same. Every value is known to be either fixed, computed from weights and constants alone, or to depend on the batch.
"""

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jax.extend.core import Literal

_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}
"""The primitives that only call another computation, and the parameter that holds it."""

Value = int | Literal
"""A numbered value, or a constant scalar."""

Values = Mapping[int, Any]
"""What numbered values are."""


def only(numbers: Collection[int], values: Values) -> dict[int, Any]:
    """Those of the values that have one of these numbers."""
    return {number: value for number, value in values.items() if number in numbers}


@dataclasses.dataclass(frozen=True, eq=False)
class Equation:
    """A primitive, what it reads and what it makes."""

    primitive: Any
    params: Mapping[str, Any]
    inputs: tuple[Value, ...]
    outputs: tuple[int, ...]

    @property
    def reads(self) -> tuple[int, ...]:
        """The numbered values among its inputs."""
        return tuple(value for value in self.inputs if not isinstance(value, Literal))


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A computation; equations stand in the order of their execution."""

    inputs: tuple[int, ...]
    outputs: tuple[Value, ...]
    equations: tuple[Equation, ...]
    constants: Mapping[int, Any]  # arrays that the computation holds itself
    avals: Mapping[int, Any]  # shape and dtype of every value
    fixed: frozenset[int]  # the values that do not depend on the batch

    def is_fixed(self, value: Value) -> bool:
        """Whether a value does not depend on the batch."""
        return isinstance(value, Literal) or value in self.fixed


def program_of(jaxpr: Any, fixed: Sequence[bool]) -> Program:
    """The program of a jaxpr.

    Args:
      jaxpr: with its constants, as `jax.make_jaxpr` gives it, or the body of a scan.
      fixed: of each input, whether it does not depend on the batch.
    """
    builder = _Builder()
    open_jaxpr, _ = _opened(jaxpr)
    inputs = tuple(builder.number(var.aval, fixed=known) for var, known in zip(open_jaxpr.invars, fixed, strict=True))
    outputs = builder.inline(jaxpr, inputs)
    return Program(inputs, outputs, tuple(builder.equations), builder.constants, builder.avals, frozenset(builder.fixed))


def _opened(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """A jaxpr and its constants; from jax 0.11 on a jaxpr holds its constants itself."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


class _Builder:
    """Numbers values and collects equations."""

    def __init__(self) -> None:
        self.equations: list[Equation] = []
        self.constants: dict[int, Any] = {}
        self.avals: dict[int, Any] = {}
        self.fixed: set[int] = set()
        self._numbers = itertools.count()

    def number(self, aval: Any, *, fixed: bool) -> int:
        number = next(self._numbers)
        self.avals[number] = aval
        if fixed:
            self.fixed.add(number)
        return number

    def inline(self, jaxpr: Any, inputs: Sequence[Value]) -> tuple[Value, ...]:
        """Adds the equations of a jaxpr that is called with these values; returns its outputs."""
        jaxpr, consts = _opened(jaxpr)
        values: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            values[var] = number = self.number(var.aval, fixed=True)
            self.constants[number] = const

        def value_of(atom: Any) -> Value:
            return atom if isinstance(atom, Literal) else values[atom]

        for eqn in jaxpr.eqns:
            read = tuple(value_of(atom) for atom in eqn.invars)
            if (called := _CALLS.get(eqn.primitive.name)) is not None:
                made: Sequence[Value] = self.inline(eqn.params[called], read)
            else:
                fixed = not eqn.effects and all(isinstance(value, Literal) or value in self.fixed for value in read)
                numbers = tuple(self.number(var.aval, fixed=fixed) for var in eqn.outvars)
                self.equations.append(Equation(eqn.primitive, eqn.params, read, numbers))
                made = numbers
            values.update(zip(eqn.outvars, made, strict=True))
        return tuple(value_of(atom) for atom in jaxpr.outvars)
