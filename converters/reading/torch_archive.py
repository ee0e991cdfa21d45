"""A torch checkpoint (`pytorch_model.bin`): a zip whose entries are not compressed, so that they can be mapped.

`<root>/data.pkl` names the tensors, `<root>/data/<key>` holds the bytes of each storage.
"""

import dataclasses
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

from converters.reading.entry import DTYPES, TensorEntry, extent, name_problem, size_problem
from converters.reading.folder import regular_file
from converters.reading.torch_pickle import Storage, StoredTensor, read_pickle
from jgptq.errors import CheckpointError

MOST_PICKLE_BYTES = 8 * 2**20
"""Bytes that `data.pkl` may have: a few hundred are needed for a tensor."""

_ZIP = b"PK\x03\x04"
_LOCAL = struct.Struct("<4s22xHH")  # of a local header: signature, length of the name, length of the extra field
_OLD = b"\x80"  # a pickle


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where the bytes of an entry of the archive lie in the file."""

    start: int
    size: int


def read_archive(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one torch file; its pickle is read and not executed.

    Raises:
      CheckpointError: missing, truncated or corrupt; not the zip format of torch; or a pickle that holds anything but tensors.
    """
    file = regular_file(path.parent, path.name, f"{path}: the shard is missing; fetch it again")
    try:
        with file.open("rb") as stream:
            _check_format(path, stream.read(4))
            with zipfile.ZipFile(stream) as archive:
                raw, places = _entries(archive, stream, file.stat().st_size)
    except _BROKEN as error:
        raise CheckpointError(f"{path}: not a whole zip archive of torch ({error}); fetch the file again") from error
    try:
        tensors = read_pickle(raw)
        return {name: _entry(path.name, name, tensor, places) for name, tensor in tensors.items()}
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; only state dicts of tensors are read") from error


def _check_format(path: Path, first: bytes) -> None:
    """Refuses what is no zip archive, by its first bytes."""
    if first.startswith(_OLD):
        raise CheckpointError(
            f"{path}: torch's format from before 1.6, a pickle that cannot be mapped; load it with torch.load(file,"
            " weights_only=True) and save it with safetensors.torch.save_file"
        )
    if first != _ZIP:
        raise CheckpointError(f"{path}: truncated or not a torch file: expected a zip archive, found {first!r}; fetch it again")


_BROKEN = (OSError, EOFError, zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, struct.error, OverflowError)
"""What `zipfile` raises on a damaged archive."""


def _entries(archive: zipfile.ZipFile, stream: BinaryIO, size: int) -> tuple[bytes, dict[str, _Place]]:
    """The pickle, and where each storage lies by its key."""
    names = archive.namelist()
    if len(set(names)) < len(names):
        raise ValueError("two entries have the same name")
    pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"expected one entry data.pkl, found {len(pickles)}")
    root = pickles[0].removesuffix("data.pkl")
    order = f"{root}byteorder"
    if order in names and _small(archive, order, 16) != b"little":
        raise ValueError("the numbers are not stored in little-endian order")
    if not _small(archive, f"{root}version", 16).strip().isdigit():
        raise ValueError("the version of the archive is no number")
    raw = _small(archive, pickles[0], MOST_PICKLE_BYTES)
    places = {info.filename: _place(stream, info, size) for info in archive.infolist()}
    _check_disjoint(places)
    data = f"{root}data/"
    return raw, {name.removeprefix(data): place for name, place in places.items() if name.startswith(data)}


def _small(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    """The content of a small entry, checked against its sum."""
    if name not in archive.NameToInfo:
        raise ValueError(f"no entry {name.split('/')[-1]}")
    info = archive.getinfo(name)
    if info.file_size > most or info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name.split('/')[-1]}: expected at most {most} bytes, not compressed, found {info.file_size}")
    return archive.read(info)


def _place(stream: BinaryIO, info: zipfile.ZipInfo, size: int) -> _Place:
    """Where the bytes of an entry lie: behind its local header, whose length only that header says."""
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
        raise ValueError(f"{info.filename!a}: expected an entry that is neither compressed nor encrypted")
    stream.seek(info.header_offset)
    signature, name, extra = _LOCAL.unpack(stream.read(_LOCAL.size))
    start = info.header_offset + _LOCAL.size + name + extra
    if signature != _ZIP or start + info.file_size > size:
        raise ValueError(f"{info.filename!a}: expected {info.file_size} bytes from byte {start}, found a file of {size}")
    return _Place(start, info.file_size)


def _check_disjoint(places: dict[str, _Place]) -> None:
    reached = 0
    for name, place in sorted(places.items(), key=lambda item: item[1].start):
        if place.size and place.start < reached:
            raise ValueError(f"{name!a} overlaps another entry")
        reached = max(reached, place.start + place.size)


def _entry(file: str, name: str, tensor: StoredTensor, places: dict[str, _Place]) -> TensorEntry:
    """One tensor, checked against its storage."""
    if problem := name_problem(name):
        raise ValueError(problem)
    if problem := size_problem(tensor.shape) or _stride_problem(tensor):
        raise ValueError(f"{name}: {problem}")
    start = _storage_start(name, tensor.storage, places)
    itemsize = DTYPES[tensor.storage.dtype].itemsize
    if tensor.offset + extent(tensor.shape, tensor.strides) > tensor.storage.count:
        raise ValueError(f"{name}: reaches behind its storage of {tensor.storage.count} elements")
    strides = None if tensor.strides == _contiguous(tensor.shape) else tensor.strides
    return TensorEntry(file, tensor.storage.dtype, tensor.shape, start + tensor.offset * itemsize, strides)


def _stride_problem(tensor: StoredTensor) -> str | None:
    """What is wrong with offset and strides, or None. No two elements of a tensor may share a place, because four bytes could
    claim to be any number of them."""
    steps = (tensor.offset, *tensor.strides)
    if len(tensor.strides) != len(tensor.shape) or not all(type(step) is int and 0 <= step < 2**48 for step in steps):
        return "expected an offset and a stride for each axis, whole numbers from 0"
    reach = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.strides, tensor.shape, strict=True) if size > 1):
        if stride < reach:
            return "expected strides by which no two elements share a place"
        reach += stride * (size - 1)
    return None


def _storage_start(name: str, storage: Storage, places: dict[str, _Place]) -> int:
    place = places.get(storage.key)
    needed = storage.count * DTYPES[storage.dtype].itemsize
    if place is None or place.size != needed:
        found = "none" if place is None else f"{place.size} bytes"
        raise ValueError(f"{name}: expected a storage of {needed} bytes, found {found}")
    return place.start


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of rows that lie one after the other."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
