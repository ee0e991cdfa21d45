"""The tensors of a checkpoint folder by name: safetensors or torch files, one or many shards, mapped and not read."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from converters.reading.entry import DTYPES, TensorEntry, name_problem
from converters.reading.json_file import read_json
from converters.reading.safetensors_header import read_header
from converters.reading.torch_archive import read_archive
from jgptq.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
_LISTED = 12  # names in a message


@dataclasses.dataclass(frozen=True)
class _Format:
    """How a folder keeps its weights."""

    single: str  # the file of a folder that has one
    index: str  # else the map from tensors to files
    read: Callable[[Path], dict[str, TensorEntry]]


_FORMATS = (
    _Format(SINGLE, INDEX, read_header),
    _Format("pytorch_model.bin", "pytorch_model.bin.index.json", read_archive),
)
"""In the order in which they are looked for."""


class Checkpoint:
    """The tensors of a folder by name; `array` gives a view of the mapped file.

    Args:
      folder: the folder.
      entries: where each tensor lies.
    """

    def __init__(self, folder: Path, entries: dict[str, TensorEntry]):
        self.folder = folder
        self.entries = entries
        self._maps: dict[str, np.memmap] = {}

    def array(self, name: str) -> np.ndarray:
        """A read-only view of a tensor; its bytes are read when the view is.

        Raises:
          CheckpointError: a dtype that is not a plain number, or a file that cannot be mapped.
        """
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{self.folder / entry.file}: {name} has dtype {entry.dtype}, expected one of {', '.join(DTYPES)}"
            )
        if entry.file not in self._maps:
            try:
                self._maps[entry.file] = np.memmap(self.folder / entry.file, np.uint8, mode="r")
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{self.folder / entry.file}: cannot be mapped ({error})") from error
        return entry.view(self._maps[entry.file])


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads the headers of a folder's shards and checks them against the files and the index; all problems in one error.

    Args:
      folder: a folder with `model.safetensors`, or with shards and their index; or the same of torch, `pytorch_model.bin`.

    Returns:
      The tensors by name.

    Raises:
      CheckpointError: no weights; a missing, truncated or corrupt shard; an index that disagrees with its shards or names a file
        outside the folder; a tensor in two shards.
    """
    names = [name for kept in _FORMATS for name in (kept.single, kept.index)]
    kept = next((kept for kept in _FORMATS if (folder / kept.index).exists() or (folder / kept.single).exists()), None)
    if kept is None:
        raise CheckpointError(f"{folder}: no {' and no '.join(names)}{_other_weights(folder)}")
    if not (folder / kept.index).exists():
        return Checkpoint(folder, kept.read(folder / kept.single))
    index = folder / kept.index
    weight_map = _weight_map(index)
    entries: dict[str, TensorEntry] = {}
    problems = []
    for file in sorted(set(weight_map.values())):
        try:
            found = kept.read(folder / file)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        twice = [f"{name} is in {entries[name].file} and in {file}" for name in found if name in entries]
        problems += [f"{folder}: {sentence}; remove one of them" for sentence in _first(twice)]
        entries |= found
    if not problems:
        lost = [name for name, file in weight_map.items() if name not in entries or entries[name].file != file]
        problems = _first([f"{index}: {name} is not in {weight_map[name]}" for name in lost])
    if problems:
        raise CheckpointError("\n".join(problems))
    return Checkpoint(folder, entries)


def _weight_map(index: Path) -> Mapping[str, str]:
    """Which file holds which tensor.

    Raises:
      CheckpointError: no such map, or one that leaves the folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index}: no weight_map from tensors to files; fetch the file again")
    if wrong := [problem for name in (*weight_map, *weight_map.values()) if (problem := name_problem(name))]:
        raise CheckpointError(f"{index}: {wrong[0]}; fetch the file again")
    outside = sorted({file for file in weight_map.values() if Path(file).name != file or file in (".", "..")})
    if outside:
        listed = ", ".join(map(repr, _first(outside)))
        raise CheckpointError(f"{index}: names files outside the folder: {listed}; refusing to read them")
    return weight_map


def _other_weights(folder: Path) -> str:
    """Files that look like weights, for the message that there are none."""
    found = sorted(path.name for path in folder.iterdir() if path.suffix in _WEIGHT_SUFFIXES)
    return f"; found {', '.join(map(repr, _first(found)))}: save the model as safetensors first" if found else ""


def _first(sentences: list[str]) -> list[str]:
    """As many of a list as one message shows."""
    rest = len(sentences) - _LISTED
    return sentences if rest <= 0 else [*sentences[:_LISTED], f"and {rest} more"]
