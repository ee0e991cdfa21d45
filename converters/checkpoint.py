"""Reading a checkpoint folder: memory-mapped safetensors, one or many shards. Nothing is executed and no tensor is read here."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jgptq.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

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

_FETCH = ["*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer.model", "*.txt", "*.jinja"]


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies."""

    file: str  # name of the shard
    dtype: str  # as in the header
    shape: tuple[int, ...]
    start: int  # first byte in the file


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
          CheckpointError: a dtype that is not a plain number.
        """
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{self.folder / entry.file}: {name} has dtype {entry.dtype}, expected one of {', '.join(DTYPES)}"
            )
        if entry.file not in self._maps:
            self._maps[entry.file] = np.memmap(self.folder / entry.file, np.uint8, mode="r")
        dtype = DTYPES[entry.dtype]
        stop = entry.start + math.prod(entry.shape) * dtype.itemsize
        return self._maps[entry.file][entry.start : stop].view(dtype).reshape(entry.shape)


def resolve_folder(source: str | Path) -> Path:
    """A local folder as it is; a hub id (`owner/name`) is fetched and its folder in the hub's cache returned.

    Raises:
      CheckpointError: neither a folder nor an id that the hub knows.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or str(source).count("/") != 1 or str(source).startswith((".", "~", "/")):
        raise CheckpointError(
            f"{source}: not a folder; expected a folder with config.json and {SINGLE}, or a hub id 'owner/name'"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), allow_patterns=_FETCH))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"{source}: no such folder, and the hub could not provide it ({error}); check the name") from error


def read_json(path: Path) -> dict[str, Any]:
    """Parses a JSON object.

    Raises:
      CheckpointError: the file is missing or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; expected a Hugging Face checkpoint folder") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); fetch the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads the headers of a folder's shards and checks them against the files and the index; all problems in one error.

    Args:
      folder: a folder with `model.safetensors`, or with shards and their index.

    Returns:
      The tensors by name.

    Raises:
      CheckpointError: no weights, a missing, truncated or corrupt shard, an index that disagrees with its shards or names
        a file outside the folder.
    """
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{folder / INDEX}: no weight_map from tensors to files; fetch the file again")
    elif (folder / SINGLE).exists():
        weight_map = None
    else:
        legacy = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"; found {', '.join(legacy)}: save the model as safetensors first" if legacy else ""
        raise CheckpointError(f"{folder}: no {SINGLE} and no {INDEX}{hint}")
    files = [SINGLE] if weight_map is None else sorted(set(weight_map.values()))
    outside = [file for file in files if Path(file).name != file or file in (".", "..")]
    if outside:
        raise CheckpointError(f"{folder / INDEX}: names files outside the folder: {', '.join(outside)}; refusing to read them")
    entries: dict[str, TensorEntry] = {}
    problems = []
    for file in files:
        try:
            entries |= read_header(folder / file)
        except CheckpointError as error:
            problems.append(str(error))
    if not problems and weight_map is not None:
        lost = [name for name, file in weight_map.items() if name not in entries or entries[name].file != file]
        problems += [f"{folder / INDEX}: {name} is not in {weight_map[name]}" for name in lost]
    if problems:
        raise CheckpointError("\n".join(problems))
    return Checkpoint(folder, entries)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file.

    Raises:
      CheckpointError: missing, truncated or corrupt; says how many bytes were expected and found.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: the shard is missing; fetch it again")
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(f"{path}: truncated or not safetensors: the header needs {8 + length} bytes, found {size}")
        try:
            header = json.loads(stream.read(length))
            entries = {name: _entry(path.name, item, 8 + length) for name, item in header.items() if name != "__metadata__"}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{path}: the header is corrupt ({error!r}); fetch the file again") from error
    needed = 8 + length + max((item["data_offsets"][1] for name, item in header.items() if name != "__metadata__"), default=0)
    if size < needed:
        raise CheckpointError(f"{path}: truncated: {needed} bytes expected, {size} found; fetch the file again")
    return entries


def _entry(file: str, item: dict[str, Any], data_start: int) -> TensorEntry:
    """One header entry, checked against itself."""
    shape = tuple(int(size) for size in item["shape"])
    start, stop = item["data_offsets"]
    itemsize = DTYPES[item["dtype"]].itemsize if item["dtype"] in DTYPES else None
    if start < 0 or stop < start or min(shape, default=0) < 0:
        raise ValueError(f"impossible offsets {item['data_offsets']} or shape {shape}")
    if itemsize is not None and stop - start != math.prod(shape) * itemsize:
        raise ValueError(f"{item['dtype']} {list(shape)} does not fill bytes {start} to {stop}")
    return TensorEntry(file, item["dtype"], shape, data_start + start)
