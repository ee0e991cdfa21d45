"""The same entries in another shape: how an array of a model and a matrix `[K, N]` or `[T, K]` hold each other's entries."""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp


class Move(NamedTuple):
    """A reshape to `sizes`, or a transposition with the permutation `sizes`."""

    kind: Literal["reshape", "transpose"]
    sizes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Reshapes and transpositions, one after the other: none loses or repeats an entry, so all can be undone."""

    shape: tuple[int, ...]  # of the array
    moves: tuple[Move, ...] = ()

    @property
    def result(self) -> tuple[int, ...]:
        """The shape after all moves."""
        shape = self.shape
        for kind, sizes in self.moves:
            shape = sizes if kind == "reshape" else tuple(shape[axis] for axis in sizes)
        return shape

    def reshaped(self, *shape: int) -> "Layout":
        """With a reshape at the end; two in a row are one."""
        if shape == self.result:
            return self
        before = self.moves[:-1] if self.moves and self.moves[-1].kind == "reshape" else self.moves
        return Layout(self.shape, (*before, Move("reshape", tuple(shape))))

    def transposed(self, *permutation: int) -> "Layout":
        """With a transposition at the end."""
        if permutation == tuple(range(len(permutation))):
            return self
        return Layout(self.shape, (*self.moves, Move("transpose", tuple(permutation))))

    def to_matrix(self, first: tuple[int, ...], last: tuple[int, ...]) -> "Layout":
        """With the axes `first` as the rows of a matrix, and the axes `last` as its columns."""
        shape = self.result
        rows, columns = (math.prod(shape[axis] for axis in axes) for axes in (first, last))
        return self.transposed(*first, *last).reshaped(rows, columns)

    def then(self, other: "Layout") -> "Layout":
        """These moves, then those of a layout that begins with this one's result."""
        joined = self
        for kind, sizes in other.moves:
            joined = joined.reshaped(*sizes) if kind == "reshape" else joined.transposed(*sizes)
        return joined

    def forward(self, array: jax.Array) -> jax.Array:
        """The array after all moves."""
        for kind, sizes in self.moves:
            array = jnp.reshape(array, sizes) if kind == "reshape" else jnp.transpose(array, sizes)
        return array

    def undone(self) -> "Layout":
        """From the result back to the array."""
        back = Layout(self.result)
        for count in reversed(range(len(self.moves))):
            kind, sizes = self.moves[count]
            inverse = tuple(sorted(range(len(sizes)), key=sizes.__getitem__))
            before = Layout(self.shape, self.moves[:count]).result
            back = back.reshaped(*before) if kind == "reshape" else back.transposed(*inverse)
        return back

    def backward(self, array: jax.Array) -> jax.Array:
        """The array of which `forward` makes this one."""
        return self.undone().forward(array)
