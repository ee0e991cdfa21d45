"""Strict JSON: no key twice, no deep nesting, no size that would fill the memory."""

import collections
import json
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from converters.reading.folder import regular_file
from jgptq.errors import CheckpointError

MOST_BYTES = 100_000_000
"""Bytes that a JSON text may have: the limit of the safetensors format for its header."""
MOST_LEVELS = 64
"""Levels of lists and objects in a config or an index."""


def parse_json(raw: bytes) -> Any:
    """The value of a JSON text.

    Raises:
      ValueError: no UTF-8, no JSON, halves of characters, a key that occurs twice in an object, or nesting beyond Python's stack.
    """
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("lists or objects are nested too deep") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file in a checkpoint folder.

    Raises:
      CheckpointError: the file is missing, lies outside its folder, or is not a JSON object.
    """
    file = regular_file(path.parent, path.name, f"{path}: missing; expected a Hugging Face checkpoint folder")
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ValueError(f"expected at most {MOST_BYTES} bytes, found {file.stat().st_size}")
        value = parse_json(file.read_bytes())
        if _deeper(value, MOST_LEVELS):
            raise ValueError(f"lists or objects are nested more than {MOST_LEVELS} deep")
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); fetch the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    for text in (text for pair in pairs for text in pair if isinstance(text, str)):
        text.encode("utf-8")  # half of a character, which JSON can escape, is no text
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, times in collections.Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f"the key {reprlib.repr(twice)} occurs twice")
    return found


def _deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects are nested more than `levels` deep; a loop, because the nesting may be that of an attack."""
    layer = [value]
    for _ in range(levels + 1):
        layer = [
            inner
            for outer in layer
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not layer:
            return False
    return True
