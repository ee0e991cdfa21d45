"""The argument shapes that tests, the compile check and the GPU benchmarks share."""

import dataclasses
from typing import Literal

Use = Literal["test_given", "test_searched", "check", "compile", "time", "rehearse"]
"""Where a shape is used: in Pallas' interpreter, against plain JAX and float64; on a GPU, against plain JAX; compiled for a GPU
without one; timed on a GPU; and in the rehearsal of the GPU benchmarks, without one."""

Grids = Literal["shared", "per_row", "searched"]
"""One given grid for all rows, one for each row, or one searched for each group."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The arguments of one block, without their values."""

    rows: int
    n: int
    grids: Grids
    drift: bool = False
    bits: int = 4
    group_size: int | None = None  # of searched grids, as are the next two
    sym: bool = True
    scale: Literal["minmax", "mse", "hessian"] = "hessian"
    uses: frozenset[Use]

    def __str__(self) -> str:
        grids = f"searched, groups of {self.group_size}, sym {self.sym}, scale {self.scale}"
        kind = grids if self.grids == "searched" else f"{self.grids} grids"
        return f"{self.rows} x {self.n}, {self.bits} bits, {kind}, drift {self.drift}"


def shapes_of(use: Use) -> tuple[Shape, ...]:
    """The shapes of one use, in the order of the list."""
    return tuple(shape for shape in SHAPES if use in shape.uses)


def _uses(*uses: Use) -> frozenset[Use]:
    return frozenset(uses)


_GIVEN = _uses("test_given")
_SEARCHED = _uses("test_searched")
_COMPILED = _uses("compile")
_ON_GPU = _uses("compile", "check", "time")

SHAPES = (
    # For the interpreter.
    Shape(rows=32, n=40, grids="shared", uses=_uses("test_given", "rehearse")),
    Shape(rows=64, n=16, grids="per_row", drift=True, uses=_GIVEN),
    Shape(rows=96, n=16, grids="shared", drift=True, uses=_GIVEN),
    Shape(rows=128, n=16, grids="shared", uses=_GIVEN),
    Shape(rows=128, n=16, grids="searched", group_size=128, uses=_SEARCHED),
    Shape(rows=128, n=40, grids="searched", group_size=32, bits=3, sym=False, scale="mse", drift=True, uses=_SEARCHED),
    Shape(rows=96, n=16, grids="searched", group_size=32, sym=False, scale="minmax", uses=_uses("test_searched", "rehearse")),
    Shape(rows=96, n=16, grids="searched", group_size=96, scale="mse", uses=_SEARCHED),
    Shape(rows=64, n=16, grids="searched", group_size=64, bits=2, drift=True, uses=_SEARCHED),
    # As the solver calls it.
    Shape(rows=128, n=4096, grids="shared", uses=_ON_GPU),
    Shape(rows=128, n=4096, grids="per_row", uses=_COMPILED),
    Shape(rows=128, n=4096, grids="shared", drift=True, uses=_uses("compile", "check")),
    Shape(rows=32, n=4096, grids="shared", uses=_COMPILED),
    Shape(rows=64, n=4096, grids="shared", uses=_COMPILED),
    Shape(rows=128, n=4096, grids="searched", group_size=128, uses=_ON_GPU),
    Shape(rows=128, n=4096, grids="searched", group_size=32, sym=False, drift=True, uses=_uses("compile", "check")),
    Shape(rows=128, n=4096, grids="searched", group_size=64, scale="mse", uses=_COMPILED),
    Shape(rows=128, n=4096, grids="searched", group_size=32, scale="minmax", uses=_COMPILED),
    Shape(rows=128, n=4096, grids="searched", group_size=32, uses=_uses("check", "time")),
)
