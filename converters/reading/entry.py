"""Where a tensor lies in a file, and the view of the mapped file that it is."""

import dataclasses
import math

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""Names of dtypes in a safetensors header."""

MOST_AXES = 32
_MOST_BYTES = 2**62  # of an array with its empty axes left out: numpy counts in int64


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies."""

    file: str  # name of the shard
    dtype: str  # as in a safetensors header
    shape: tuple[int, ...]
    start: int  # first byte in the file
    strides: tuple[int, ...] | None = None  # elements from one index of an axis to the next; None: rows one after the other

    def view(self, file: np.memmap) -> np.ndarray:
        """The tensor as a view of its mapped file; its bytes are read when the view is."""
        dtype = DTYPES[self.dtype]
        if self.strides is None:
            return file[self.start : self.start + math.prod(self.shape) * dtype.itemsize].view(dtype).reshape(self.shape)
        flat = file[self.start : self.start + extent(self.shape, self.strides) * dtype.itemsize].view(dtype)
        steps = tuple(stride * dtype.itemsize for stride in self.strides)
        return np.lib.stride_tricks.as_strided(flat, self.shape, steps, subok=True, writeable=False)


def extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first one of a tensor to behind its last one."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def size_problem(value: object) -> str | None:
    """What is wrong with a shape as a file states it, or None: it must be a list of whole numbers that numpy can count."""
    if not isinstance(value, list | tuple) or not all(type(size) is int and size >= 0 for size in value):
        return "expected a shape of whole numbers from 0"
    if len(value) > MOST_AXES or any(size > _MOST_BYTES for size in value):
        return f"expected at most {MOST_AXES} axes, of less than {_MOST_BYTES} elements"
    if math.prod(max(size, 1) for size in value) * 8 > _MOST_BYTES:
        return f"expected a shape of less than {_MOST_BYTES // 8} elements"
    return None


def name_problem(name: object) -> str | None:
    """What is wrong with the name of a tensor or of a file, or None: it must be text that an error message can show."""
    if isinstance(name, str) and name.isprintable():
        return None
    return f"expected names of printable characters, found {ascii(name)[:80]}"
