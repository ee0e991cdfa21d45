"""The header of a safetensors file, as strict as the format demands.

A file is 8 bytes of length, a JSON object of that length, and data. The tensors fill the data without a gap or an overlap: no two
names can read the same bytes.
"""

import math
import re
import reprlib
from pathlib import Path
from typing import Any

from converters.reading.entry import DTYPES, TensorEntry, name_problem, size_problem
from converters.reading.folder import regular_file
from converters.reading.json_file import MOST_BYTES, parse_json
from jgptq.errors import CheckpointError

_METADATA = "__metadata__"


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file.

    Raises:
      CheckpointError: missing, truncated or corrupt; says how many bytes were expected and found.
    """
    file = regular_file(path.parent, path.name, f"{path}: the shard is missing; fetch it again")
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(f"{path}: truncated or not safetensors: the header needs {8 + length} bytes, found {size}")
            if length > MOST_BYTES:
                raise CheckpointError(f"{path}: the header is corrupt: expected at most {MOST_BYTES} bytes of it, found {length}")
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    try:
        items = _items(raw)
        entries = {name: _entry(path.name, name, item, 8 + length) for name, item in items.items()}
        used = _contiguous(items)
    except ValueError as error:
        raise CheckpointError(f"{path}: the header is corrupt ({error}); fetch the file again") from error
    if size != 8 + length + used:
        state = "truncated" if size < 8 + length + used else "bytes follow the last tensor"
        raise CheckpointError(f"{path}: {state}: {8 + length + used} bytes expected, {size} found; fetch the file again")
    return entries


def _items(raw: bytes) -> dict[str, dict[str, Any]]:
    """The header's entries without its metadata."""
    if not raw.startswith(b"{"):
        raise ValueError("expected a JSON object that begins with its first byte")
    header = parse_json(raw)
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{_METADATA}: expected an object of strings")
    for name, item in header.items():
        if problem := name_problem(name):
            raise ValueError(problem)
        if not isinstance(item, dict) or item.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{name}: expected an object of dtype, shape and data_offsets, found {reprlib.repr(item)}")
    return header


def _entry(file: str, name: str, item: dict[str, Any], data_start: int) -> TensorEntry:
    """One header entry, checked against itself."""
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(dtype, str) or not re.fullmatch(r"[A-Za-z0-9_]{1,16}", dtype):
        raise ValueError(f"{name}: expected the name of a dtype, found {reprlib.repr(dtype)}")
    if problem := size_problem(shape):
        raise ValueError(f"{name}: {problem}, found {reprlib.repr(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(offset) is int for offset in offsets):
        raise ValueError(f"{name}: expected data_offsets [first byte, byte behind the last], found {reprlib.repr(offsets)}")
    start, stop = offsets
    if not 0 <= start <= stop < 2**63:
        raise ValueError(f"{name}: impossible data_offsets {reprlib.repr(offsets)}")
    if dtype in DTYPES and stop - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{name}: {dtype} {list(shape)} does not fill bytes {start} to {stop}")
    return TensorEntry(file, dtype, tuple(shape), data_start + start)


def _contiguous(items: dict[str, dict[str, Any]]) -> int:
    """The number of bytes of data, each of which belongs to exactly one tensor."""
    reached, before = 0, "the header"
    for name, (start, stop) in sorted(((name, item["data_offsets"]) for name, item in items.items()), key=lambda item: item[1]):
        if start != reached:
            problem = "overlap" if start < reached else "leave a gap"
            raise ValueError(f"{before} and {name} {problem}: expected data_offsets from {reached}, found {start}")
        reached, before = stop, name
    return reached
