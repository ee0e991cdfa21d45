"""The argument shapes that tests, the compile check, the tuner and the GPU benchmarks share."""

import dataclasses
from typing import Literal

from pallas_kernels.int4_matmul.planes import Planes

Use = Literal["test", "test_mosaic", "check", "compile", "compile_mosaic", "time_first", "time", "tune", "rehearse"]
"""Where a shape is used:

- test: in Pallas' interpreter and in plain JAX, against float64; test_mosaic: in the interpreter of Mosaic GPU;
- check: on a GPU, against float64;
- compile, compile_mosaic: compiled for a GPU without one, `benchmarks/gpu/compile_kernels.py`;
- time_first, time, tune: on a GPU, the most telling first, all of them, and by the tuner;
- rehearse: what the GPU benchmarks run on a machine without one.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The arguments of one product, without their values."""

    m: int  # rows of x
    k: int
    n: int
    group_size: int = 128
    bits: int = 4
    sym: bool = True
    reordered: bool = False  # whether rows of K belong to groups in any order
    dtype: str = "bfloat16"  # of x
    uses: frozenset[Use]

    @property
    def layout(self) -> Planes:
        """The runtime layout of the kernel."""
        return Planes(k=self.k, n=self.n, bits=self.bits, group_size=self.group_size)

    def __str__(self) -> str:
        facts = [f"int{self.bits}, M {self.m}, {self.k} x {self.n}, group {self.group_size}", self.dtype]
        facts += ["zeros"] * (not self.sym) + ["reordered"] * self.reordered
        return ", ".join(facts)


def shapes_of(use: Use) -> tuple[Shape, ...]:
    """The shapes of one use, in the order of the list."""
    return tuple(shape for shape in SHAPES if use in shape.uses)


def _uses(*uses: Use) -> frozenset[Use]:
    return frozenset(uses)


_SMALL = _uses("test", "check")
_SMALL_AND_REHEARSED = _uses("test", "check", "rehearse")
_LARGE = _uses("check")
_COMPILED = _uses("compile")
_MOSAIC = _uses("test_mosaic", "check")

_CHECKED = (
    # One row; tiles that are not full; groups within a tile, of several tiles, across tiles, of all of K.
    Shape(m=1, k=256, n=64, uses=_SMALL_AND_REHEARSED),
    Shape(m=2, k=96, n=8, group_size=32, sym=False, dtype="float16", uses=_SMALL),
    Shape(m=17, k=384, n=72, group_size=32, sym=False, reordered=True, uses=_SMALL_AND_REHEARSED),
    Shape(m=3, k=160, n=40, group_size=160, sym=False, dtype="float32", uses=_SMALL),
    Shape(m=33, k=512, n=64, group_size=512, sym=False, uses=_uses("test", "test_mosaic", "check")),
    Shape(m=33, k=192, n=128, group_size=96, reordered=True, dtype="float16", uses=_SMALL),
    Shape(m=65, k=1024, n=64, group_size=256, sym=False, uses=_SMALL),
    # Rows of x of two programs; as many as a kernel takes, and one more.
    Shape(m=129, k=256, n=64, group_size=64, dtype="float32", uses=_SMALL),
    Shape(m=256, k=128, n=64, sym=False, uses=_SMALL),
    Shape(m=257, k=128, n=64, sym=False, reordered=True, uses=_SMALL_AND_REHEARSED),
    Shape(m=5, k=512, n=136, group_size=64, bits=8, sym=False, dtype="float32", uses=_SMALL),
    Shape(m=64, k=256, n=64, bits=8, reordered=True, uses=_SMALL),
    # In the interpreter of Mosaic GPU.
    Shape(m=5, k=512, n=136, group_size=64, sym=False, uses=_MOSAIC),
    Shape(m=1, k=160, n=40, group_size=32, uses=_uses("test_mosaic", "check", "rehearse")),
    # Too large for an interpreter.
    Shape(m=1, k=4096, n=4096, uses=_LARGE),
    Shape(m=3, k=4096, n=4096, sym=False, uses=_LARGE),
    Shape(m=17, k=4096, n=4104, group_size=32, sym=False, reordered=True, dtype="float16", uses=_LARGE),
    Shape(m=33, k=4128, n=1000, group_size=4128, sym=False, uses=_LARGE),
    Shape(m=64, k=2048, n=512, group_size=64, dtype="float16", uses=_LARGE),
    Shape(m=129, k=1536, n=640, group_size=96, sym=False, reordered=True, uses=_LARGE),
    Shape(m=5, k=1024, n=256, sym=False, dtype="float32", uses=_LARGE),
    Shape(m=257, k=1024, n=256, uses=_LARGE),
)

_SQUARES = (
    # Numbers of rows whose tilings differ, at 4096 x 4096.
    *(Shape(m=m, k=4096, n=4096, uses=_COMPILED) for m in (16, 32, 64, 128, 256)),
    *(Shape(m=m, k=4096, n=4096, sym=False, uses=_COMPILED) for m in (16, 32, 64, 128, 256)),
    *(Shape(m=m, k=4096, n=4096, group_size=32, dtype="float16", uses=_COMPILED) for m in (16, 32, 64, 128, 256)),
    Shape(m=16, k=4096, n=4096, group_size=4096, sym=False, uses=_COMPILED),
    *(Shape(m=m, k=4096, n=4096, dtype="float32", uses=_COMPILED) for m in (16, 128)),
    Shape(m=1, k=4096, n=4096, bits=8, sym=False, uses=_COMPILED),
    Shape(m=16, k=4096, n=4096, bits=8, sym=False, dtype="float16", uses=_COMPILED),
    Shape(m=64, k=4096, n=4096, bits=8, sym=False, uses=_COMPILED),
    *(Shape(m=m, k=4096, n=4096, uses=_uses("compile_mosaic")) for m in (1, 64, 128)),
    Shape(m=16, k=4096, n=4096, group_size=32, sym=False, uses=_uses("compile_mosaic")),
    Shape(m=16, k=4096, n=4096, group_size=64, dtype="float16", uses=_uses("compile_mosaic")),
)

_FIRST = ((4096, 4096), (4096, 28672), (14336, 4096))
"""Of a Llama of 8 billion parameters: a projection, gate and up, down."""
_LATER = ((8192, 57344), (28672, 8192))
"""Of one of 70 billion: gate and up, down."""
_FIRST_M = (1, 16, 64, 128)
_LATER_M = (2, 4, 32, 512, 2048)

_TIMED = (
    *(Shape(m=m, k=k, n=n, uses=_uses("time_first", "time", "tune")) for k, n in _FIRST[:2] for m in (1, 16)),
    *(Shape(m=m, k=k, n=n, uses=_uses("time_first", "time")) for k, n in _FIRST[:2] for m in (64, 128)),
    *(Shape(m=m, k=k, n=n, uses=_uses("time_first", "time")) for k, n in _FIRST[2:] for m in _FIRST_M),
    *(Shape(m=m, k=k, n=n, uses=_uses("time")) for k, n in _LATER for m in _FIRST_M),
    *(Shape(m=m, k=k, n=n, uses=_uses("time")) for k, n in (*_FIRST, *_LATER) for m in _LATER_M),
)

SHAPES = (*_CHECKED, *_SQUARES, *_TIMED)
