"""Finds the linears of a program: products of a weight with what depends on the batch.

A weight is followed from the tree to its product through casts, reshapes and transpositions, and into the body of a scan that
runs over stacked layers. What else happens to an array of the tree is the reason why it stays float.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jax.extend.core import Literal

from jgptq.trace.layout import Layout
from jgptq.trace.program import Equation, Program, Value, program_of

_UNCHANGED = ("convert_element_type", "copy", "copy_p", "name", "sharding_constraint", "stop_gradient", "optimization_barrier")
_RESHAPING = ("reshape", "squeeze", "expand_dims", "broadcast_in_dim")
_IN_WORDS = {
    "gather": "its rows are looked up (gather)",
    "conv_general_dilated": "it is the kernel of a convolution",
    "cond": "it is read inside a cond, whose branch is known only when the model runs",
    "while": "it is read inside a while loop, whose number of steps is known only when the model runs",
}


@dataclasses.dataclass(frozen=True)
class View:
    """A value that holds the entries of another one, its root."""

    root: int
    layout: Layout  # from the root's shape
    dtypes: tuple[Any, ...] = ()  # that the entries are cast to, one after the other


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """A product `y = x W` of a weight W of the tree with a value x that depends on the batch."""

    leaf: int  # which leaf of the tree W is, or is a layer of
    weight: int  # W's root in the program
    position: int  # of the product among the equations
    reads: int  # x
    result: int  # y
    w_kn: Layout  # from the leaf's layer to [K, N]
    x_tk: Layout  # from x to [T, K]
    y_tn: Layout  # from y to [T, N]
    source: tuple[int, Layout]  # equal for products that read the same [T, K]

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N)."""
        k, n = self.w_kn.result
        return k, n


@dataclasses.dataclass(frozen=True, eq=False)
class Loop:
    """A scan over stacked layers; inputs and outputs of the body are the scan's, with one layer in place of the stack."""

    equation: Equation
    consts: int  # how many of its inputs are the same for all layers
    carries: int  # how many are handed from layer to layer; the rest is stacked
    body: Program
    contents: "Contents"
    stacks: Mapping[int, View]  # body input -> the outer view of the leaf whose layers it is

    @property
    def length(self) -> int:
        """How many layers."""
        return int(self.equation.params["length"])

    @property
    def carried(self) -> tuple[int, ...]:
        """The outputs that the last layer hands on."""
        return self.equation.outputs[: self.carries]

    @property
    def order(self) -> range:
        """The layers in the order of their execution."""
        return range(self.length)[:: -1 if self.equation.params["reverse"] else 1]


@dataclasses.dataclass(frozen=True, eq=False)
class Contents:
    """What a program holds."""

    linears: tuple[Linear, ...]
    loops: Mapping[int, Loop]  # position -> a scan that holds linears
    views: Mapping[int, View]  # of values that are no roots


Uses = dict[int, list[Linear | str]]
"""What happens to each leaf: it is the weight of a linear, or something else, in words."""


def find_linears(program: Program, leaves: Mapping[int, int], uses: Uses) -> Contents:
    """Finds the linears of a program.

    Args:
      program: the program.
      leaves: input of the program -> the leaf of the tree that it is, or is a layer of.
      uses: what happens to each leaf is added here.
    """
    search = _Search(program, leaves, uses)
    for position, equation in enumerate(program.equations):
        search.visit(position, equation)
    for value in program.outputs:
        search.used(value, "the function returns it")
    return Contents(tuple(search.linears), search.loops, search.views)


class _Search:
    """One pass over a program's equations."""

    def __init__(self, program: Program, leaves: Mapping[int, int], uses: Uses):
        self.program = program
        self.leaves = leaves
        self.uses = uses
        self.linears: list[Linear] = []
        self.loops: dict[int, Loop] = {}
        self.views: dict[int, View] = {}

    def view(self, value: int) -> View:
        return self.views.get(value) or View(value, Layout(tuple(self.program.avals[value].shape)))

    def leaf(self, value: Value) -> int | None:
        """The leaf that a value holds the entries of, if any."""
        return None if isinstance(value, Literal) else self.leaves.get(self.view(value).root)

    def used(self, value: Value, how: str | Linear) -> None:
        if (leaf := self.leaf(value)) is not None:
            self.uses[leaf].append(how)

    def visit(self, position: int, equation: Equation) -> None:
        name = equation.primitive.name
        fixed = all(self.program.is_fixed(value) for value in equation.inputs)
        if self._moved(equation):
            return
        if name == "dot_general" and not fixed:
            self._product(position, equation)
        elif name == "scan" and not fixed:
            self._scan(position, equation)
        else:
            otherwise = f"another array is computed from it ({name})" if fixed else f"it is read by {name}"
            for value in equation.inputs:
                self.used(value, otherwise if fixed else _IN_WORDS.get(name, otherwise))

    def _moved(self, equation: Equation) -> bool:
        """Whether the equation hands on the entries of its inputs; then its outputs are views of them."""
        name = equation.primitive.name
        if name not in (*_UNCHANGED, *_RESHAPING, "transpose") or len(equation.reads) != len(equation.outputs):
            return False
        for value, made in zip(equation.reads, equation.outputs, strict=True):
            view, shape = self.view(value), tuple(self.program.avals[made].shape)
            if math.prod(shape) != math.prod(view.layout.shape):
                return False  # a broadcast that repeats entries
            layout, dtypes = view.layout.reshaped(*shape), view.dtypes
            if name == "transpose":
                layout = view.layout.transposed(*equation.params["permutation"])
            if name == "convert_element_type":
                dtypes = (*dtypes, self.program.avals[made].dtype)
            self.views[made] = View(view.root, layout, dtypes)
        return True

    def _product(self, position: int, equation: Equation) -> None:
        """A product of which at least one operand depends on the batch."""
        fixed = [self.program.is_fixed(value) for value in equation.inputs]
        owned = [index for index, value in enumerate(equation.inputs) if fixed[index] and self.leaf(value) is not None]
        if not owned:
            return
        side = owned[0]
        if any(equation.params["dimension_numbers"][1]):
            self.used(equation.inputs[side], "it holds one weight for each entry of a batched product")
            return
        linear = self._linear(position, equation, side)
        self.linears.append(linear)
        self.uses[linear.leaf].append(linear)

    def _linear(self, position: int, equation: Equation, side: int) -> Linear:
        weight, x = equation.inputs[side], equation.inputs[1 - side]
        assert isinstance(weight, int)
        assert isinstance(x, int)
        contracted = equation.params["dimension_numbers"][0]
        pairs = sorted(zip(contracted[side], contracted[1 - side], strict=True))
        w_axes, x_axes = tuple(int(w) for w, _ in pairs), tuple(int(axis) for _, axis in pairs)
        w_rank, x_rank = (len(self.program.avals[value].shape) for value in (weight, x))
        w_free = tuple(axis for axis in range(w_rank) if axis not in w_axes)
        x_free = tuple(axis for axis in range(x_rank) if axis not in x_axes)
        # The result has the free axes of the left operand, then those of the right one.
        y_free, y_features = tuple(range(len(x_free))), tuple(range(len(x_free), len(x_free) + len(w_free)))
        if side == 0:
            y_features, y_free = tuple(range(len(w_free))), tuple(range(len(w_free), len(w_free) + len(x_free)))
        result = equation.outputs[0]
        view, read = self.view(weight), self.view(x)
        x_tk = Layout(tuple(self.program.avals[x].shape)).to_matrix(x_free, x_axes)
        return Linear(
            leaf=self.leaves[view.root],
            weight=view.root,
            position=position,
            reads=x,
            result=result,
            w_kn=view.layout.to_matrix(w_axes, w_free),
            x_tk=x_tk,
            y_tn=Layout(tuple(self.program.avals[result].shape)).to_matrix(y_free, y_features),
            source=(read.root, read.layout.then(x_tk)),
        )

    def _scan(self, position: int, equation: Equation) -> None:
        """Looks into the body of a scan: it is a loop over layers if a linear's weight is one layer of a stacked leaf."""
        consts, carries = _counts(equation)
        known = [
            self.program.is_fixed(value) and not consts <= index < consts + carries for index, value in enumerate(equation.inputs)
        ]
        body = program_of(equation.params["jaxpr"], known)
        stacks: dict[int, View] = {}
        for index, (value, inner) in enumerate(zip(equation.inputs, body.inputs, strict=True)):
            if self.leaf(value) is None:
                continue
            assert isinstance(value, int)
            if index < consts + carries:
                self.used(value, "it is read inside a scan, the same at every step")
            elif self.view(value).layout.moves:
                self.used(value, "its layers are moved to another axis before the scan over them")
            else:
                stacks[inner] = self.view(value)
        layers = {inner: self.leaves[view.root] for inner, view in stacks.items()}
        contents = find_linears(body, layers, self.uses)
        if contents.linears or contents.loops:
            self.loops[position] = Loop(equation, consts, carries, body, contents, stacks)


def _counts(equation: Equation) -> tuple[int, int]:
    """How many inputs of a scan are constant, and how many are carried."""
    params = equation.params
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carries, _ = params["ft_in"].unpack()  # from jax 0.11 on
    return len(consts), len(carries)
