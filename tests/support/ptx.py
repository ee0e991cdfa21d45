"""The few PTX instructions that the kernels use, on integers and numpy floats, after NVIDIA's PTX ISA; independent of any GPU.

`elementwise_inline_asm` stands in for Triton's primitive of that name: `pack` neighbouring elements are handed to one run of the
assembly, a register each, and 16-bit results share a register, the first in its low half.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MASK = 0xFFFFFFFF


def _float(bits: int) -> np.float32:
    return np.uint32(bits).view(np.float32)


def _bits(value: np.float32) -> int:
    return int(np.float32(value).view(np.uint32))


def _halves(dtype: Any, bits: int) -> np.ndarray:
    return np.array([bits & 0xFFFF, bits >> 16], np.uint16).view(dtype)


def _packed(halves: np.ndarray) -> int:
    low, high = halves.view(np.uint16).tolist()
    return low | high << 16


def prmt(a: int, b: int, selector: int) -> int:
    """Byte i of the result is byte `selector[i]` of the eight bytes of b and a."""
    pair = [(a | b << 32) >> 8 * index & 0xFF for index in range(8)]
    return sum(pair[selector >> 4 * index & 7] << 8 * index for index in range(4))


def lop3(a: int, b: int, c: int, table: int) -> int:
    """Bit by bit, what the truth table says of three bits."""
    result = 0
    for index in range(32):
        row = (a >> index & 1) << 2 | (b >> index & 1) << 1 | c >> index & 1
        result |= (table >> row & 1) << index
    return result


def _subtract(dtype: Any) -> Callable[[int, int], int]:
    return lambda a, b: _packed(_halves(dtype, a) - _halves(dtype, b))


def _convert(dtype: Any) -> Callable[[int, int], int]:
    """Two float32 into one register; the first operand becomes the high half."""
    return lambda high, low: _packed(np.array([_float(low), _float(high)], np.float32).astype(dtype))


def _fma(a: int, b: int, c: int) -> int:
    """The product of two float32 is exact in float64, and the sum is rounded there before it is rounded here."""
    return _bits(np.float32(float(_float(a)) * float(_float(b)) + float(_float(c))))


OPERATIONS: dict[str, Callable[..., int]] = {
    "mov.b32": lambda a: a,
    "shr.b32": lambda a, by: a >> by,
    "shl.b32": lambda a, by: a << by & MASK,
    "prmt.b32": prmt,
    "lop3.b32": lop3,
    "sub.bf16x2": _subtract(jnp.bfloat16),
    "sub.f16x2": _subtract(np.float16),
    "sub.f32": lambda a, b: _bits(_float(a) - _float(b)),
    "cvt.rn.bf16x2.f32": _convert(jnp.bfloat16),
    "cvt.rn.f16x2.f32": _convert(np.float16),
    "cvt.rni.f32.f32": lambda a: _bits(np.rint(_float(a))),
    "div.rn.f32": lambda a, b: _bits(_float(a) / _float(b)),
    "fma.rn.f32": _fma,
}


def run(assembly: str, operands: Sequence[int]) -> int:
    """What `$0` holds in the end."""
    registers = {f"${index}": value for index, value in enumerate(operands, start=1)}

    def value(name: str) -> int:
        if name.startswith("0f"):
            return int(name[2:], 16)
        return registers[name] if name in registers else int(name, 0) & MASK

    for line in assembly.strip("{} \n").split(";"):
        instruction = line.strip()
        if instruction and not instruction.startswith(".reg"):
            name, rest = instruction.split(maxsplit=1)
            target, *sources = re.split(r",\s*", rest)
            registers[target] = OPERATIONS[name](*map(value, sources))
    return registers["$0"]


def elementwise_inline_asm(
    assembly: str, *, args: Sequence[jax.Array], constraints: str, pack: int, result_shape_dtypes: Sequence[jax.ShapeDtypeStruct]
) -> list[np.ndarray]:
    """Runs the assembly on every `pack` neighbours of the arguments."""
    [result] = result_shape_dtypes
    assert constraints.count(",") == pack * len(args), "one register for the result, one for every operand"
    flat = [np.asarray(arg).reshape(-1, pack).view(np.uint32).tolist() for arg in args]
    registers = [run(assembly, list(itertools.chain(*operands))) for operands in zip(*flat, strict=True)]
    return [np.array(registers, np.uint32).view(result.dtype).reshape(result.shape)]
