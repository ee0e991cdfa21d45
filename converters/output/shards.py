"""Writing safetensors shards whose layout is planned first and whose tensors come in any order.

All shapes are known before a run begins, so every shard's header is written and its space reserved at the start: a disk that is
too small is noticed before the work and not after it, each tensor goes straight to its place, and a run that was stopped finds
what it had written. The folder carries a temporary name until it is whole.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from converters.checkpoint import INDEX, SINGLE
from converters.output.folders import PartialFolder
from converters.reading.entry import DTYPES
from jgptq.errors import ConfigError, OutputError

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A tensor that will be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class _Place:
    file: str
    start: int
    spec: TensorSpec


def parse_size(size: int | str) -> int:
    """Bytes of "5GB", "300MiB" or a plain number.

    Raises:
      ConfigError: not a positive size.
    """
    match = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z]*)\s*", str(size))
    unit = _UNITS.get(match[2].upper()) if match else None
    try:
        count = float(match[1]) * unit if match and unit else 0
    except ValueError:
        count = 0
    if count < 1:
        raise ConfigError(f"max_shard_size {size!r} is not a size; write it as 5GB or 300MiB")
    return int(count)


class ShardWriter(PartialFolder):
    """Writes tensors into reserved places under `<out>.partial`.

    Args:
      out: the folder to make.
      specs: every tensor, in the order in which they should lie.
      max_shard_size: bytes in one shard at most, unless one tensor alone is larger.
      resume: keep shards of the same layout that are already there.

    Raises:
      OutputError: the disk cannot hold the result.
    """

    def __init__(self, out: Path, specs: Iterable[TensorSpec], *, max_shard_size: int | str = "5GB", resume: bool = False):
        self._places: dict[str, _Place] = {}
        self._headers: dict[str, bytes] = {}
        self._sizes: dict[str, int] = {}
        self._plan(list(specs), parse_size(max_shard_size))
        super().__init__(out, needed=sum(self._sizes.values()))
        self.make(clear=not resume)
        try:
            for file in self._headers:
                self.guard(file, functools.partial(self._reserve, file))
        except OutputError:
            if not resume:
                shutil.rmtree(self.folder)  # nothing is in it yet, and what it took would keep the disk full
            raise

    @property
    def files(self) -> list[str]:
        """Names of the shards."""
        return list(self._headers)

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes one tensor to its place.

        Args:
          name: as in the plan.
          array: of the planned dtype and shape.

        Raises:
          OutputError: the disk is full.
          ValueError: the array is not what was planned; nothing is written.
        """
        place = self._places[name]
        if array.dtype != place.spec.dtype or array.shape != place.spec.shape:
            planned = f"{place.spec.dtype} {list(place.spec.shape)}"
            raise ValueError(f"{name}: planned as {planned}, given {array.dtype} {list(array.shape)}")
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self.guard(place.file, lambda: self._write_at(place.file, place.start, raw))

    def finish(self) -> Path:
        """Writes the index, and renames the folder: from here on it is whole.

        Returns:
          The folder.
        """
        if len(self._headers) > 1:
            total = sum(place.spec.nbytes for place in self._places.values())
            index = {"metadata": {"total_size": total}, "weight_map": {name: place.file for name, place in self._places.items()}}
            self.write_text(INDEX, json.dumps(index, indent=2) + "\n")
        return super().finish()

    def _plan(self, specs: list[TensorSpec], limit: int) -> None:
        shards: list[list[TensorSpec]] = [[]]
        filled = 0
        for spec in specs:
            if shards[-1] and filled + spec.nbytes > limit:
                shards.append([])
                filled = 0
            shards[-1].append(spec)
            filled += spec.nbytes
        for number, shard in enumerate(shards, 1):
            file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            starts = list(itertools.accumulate((spec.nbytes for spec in shard), initial=0))
            for spec, start, stop in zip(shard, starts, starts[1:], strict=False):
                header[spec.name] = {"dtype": _DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, stop]}
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)
            self._headers[file] = len(text).to_bytes(8, "little") + text
            self._sizes[file] = len(self._headers[file]) + starts[-1]
            for spec, start in zip(shard, starts, strict=False):
                self._places[spec.name] = _Place(file, len(self._headers[file]) + start, spec)

    def _reserve(self, file: str) -> None:
        """Writes the header and claims the blocks of the whole file, so that a later write cannot run out of space."""
        with (self.folder / file).open("r+b" if (self.folder / file).exists() else "w+b") as stream:
            stream.write(self._headers[file])
            stream.flush()
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(stream.fileno(), 0, self._sizes[file])
            else:
                stream.truncate(self._sizes[file])

    def _write_at(self, file: str, start: int, raw: np.ndarray) -> None:
        with (self.folder / file).open("r+b") as stream:
            stream.seek(start)
            stream.write(raw.data)
