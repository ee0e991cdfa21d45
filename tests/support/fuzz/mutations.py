"""Random damage: to values of a JSON file, to headers, pickles and archives, to bytes, to whole files."""

import io
import json
import random
import re
import zipfile
from collections.abc import Callable
from typing import Any

from fuzz.folders import Files
from jgptq.models.architecture.families import FAMILIES, SWITCHES
from jgptq.models.architecture.typed import KEYS, QUANTIZATION, ROPE

Change = Callable[[random.Random, Files], str]
"""Damages files in place and says what it did."""

DEEP = "\0deep"  # stands for lists nested 100,000 deep
ODD: list[Any] = [None, True, False, 0, 1, -1, 2, 3, 64, 10**9, 2**31, 2**63, -(2**70), 10**400, 0.0, -0.5, 1.5, 64.0, 1e308]
ODD += [float("nan"), float("inf"), "", "64", "silu", "bfloat16", "gptq_v2", "\ud800", "\x1b[2J", "x" * 5000, DEEP]
ODD += [[], [1], [None] * 3, ["full_attention"], [[[[1]]]], {}, {"a": 1}, {"type": "yarn"}, {"rope_type": "linear", "factor": -1}]
WORDS = [
    *FAMILIES,
    "default",
    "linear",
    "dynamic",
    "yarn",
    "longrope",
    "llama3",
    "gelu",
    "relu",
    "gptq",
    "gptq_v2",
    "awq",
    "float16",
]


def json_value(rng: random.Random, files: Files) -> str:
    """Changes, removes, doubles or adds a value somewhere in a JSON file."""
    name = rng.choice([name for name in files if name.endswith(".json")] or list(files))
    try:
        tree = json.loads(files[name])
    except (ValueError, RecursionError):
        return flipped_bytes(rng, files)  # an earlier change has broken it
    changed = _change_tree(rng, tree)
    files[name] = _dumped(tree)
    return f"{name}: {changed}"


def header_value(rng: random.Random, files: Files) -> str:
    """Changes the header of a safetensors file, which stays one as a whole."""
    names = [name for name in files if name.endswith(".safetensors")]
    if not names:
        return pickle_bytes(rng, files) if any(name.endswith(".bin") for name in files) else flipped_bytes(rng, files)
    name = rng.choice(names)
    length = int.from_bytes(files[name][:8], "little")
    try:
        header = json.loads(files[name][8 : 8 + length])
    except (ValueError, RecursionError):
        return flipped_bytes(rng, files)
    changed = _swap(rng, header) if rng.random() < 0.5 else _change_tree(rng, header)
    text = _dumped(header)
    files[name] = len(text).to_bytes(8, "little") + text + files[name][8 + length :]
    return f"{name}: header, {changed}"


def pickle_bytes(rng: random.Random, files: Files) -> str:
    """Changes bytes of the pickle of a torch file, or entries of its archive, which stays one as a whole."""
    names = [name for name in files if name.endswith(".bin")]
    if not names:
        return header_value(rng, files) if any(name.endswith(".safetensors") for name in files) else flipped_bytes(rng, files)
    name = rng.choice(names)
    try:
        with zipfile.ZipFile(io.BytesIO(files[name])) as archive:
            entries = {entry: archive.read(entry) for entry in archive.namelist()}
    except Exception:
        return flipped_bytes(rng, files)
    target = rng.choice([entry for entry in entries if entry.endswith("data.pkl")] * 8 + list(entries))
    if rng.random() < 0.1:
        del entries[target]
        changed = f"{target} removed"
    else:
        target = target if "/data/" not in target else rng.choice([entry for entry in entries if "/data/" not in entry])
        entries[target], changed = _edited(rng, entries[target])  # not a storage, whose values nothing checks
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", rng.choice([zipfile.ZIP_STORED] * 9 + [zipfile.ZIP_DEFLATED])) as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)
    files[name] = stream.getvalue()
    return f"{name}: {target}, {changed}"


def flipped_bytes(rng: random.Random, files: Files) -> str:
    """Changes bytes at the beginning or the end of a file, where headers and directories are."""
    name = rng.choice(list(files))
    raw = files[name]
    near = min(len(raw), rng.choice([8, 64, 1024]))
    start = 0 if rng.random() < 0.6 else len(raw) - near
    part, changed = _edited(rng, raw[start : start + near])
    files[name] = raw[:start] + part + raw[start + near :]
    return f"{name}: from byte {start}, {changed}"


def whole_file(rng: random.Random, files: Files) -> str:
    """Removes, empties, cuts, lengthens, renames or exchanges files."""
    name, other = rng.choice(list(files)), rng.choice(list(files))
    raw = files[name]
    action = rng.choice(["removed", "emptied", "cut", "cut", "lengthened", "renamed", "exchanged"])
    if action == "removed":
        del files[name]
    elif action == "emptied":
        files[name] = b""
    elif action == "cut":
        files[name] = raw[: rng.randrange(len(raw) + 1)]
    elif action == "lengthened":
        files[name] = raw + rng.randbytes(rng.choice([1, 8, 1000]))
    elif action == "renamed":
        files[rng.choice(["model.safetensors", "pytorch_model.bin", "quantize_config.json", "x"])] = files.pop(name)
    else:
        files[name], files[other] = files[other], raw
    return f"{name}: {action}" + (f" with {other}" if action == "exchanged" else "")


CHANGES: tuple[Change, ...] = (
    json_value,
    json_value,
    json_value,
    header_value,
    header_value,
    pickle_bytes,
    flipped_bytes,
    whole_file,
)
"""Drawn from alike."""


def _change_tree(rng: random.Random, tree: Any) -> str:
    """Changes one value of a tree of dicts and lists in place."""
    if not isinstance(tree, dict | list) or not tree:
        return "nothing"
    holder, path = tree, ""
    while True:
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
        path += f"[{key!r}]"
        inner = holder[key]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.3:
            break
        holder = inner
    action = rng.random()
    if action < 0.15:
        del holder[key]
        return f"{path} removed"
    if action < 0.3 and isinstance(holder, dict):
        key = rng.choice([*KEYS, *ROPE, *QUANTIZATION, *SWITCHES, "auto_map"])
        holder[key] = rng.choice([*ODD, *WORDS])
        return f"{key!r} = {str(holder[key])[:40]!a} next to {path}"
    holder[key] = _nearby(rng, holder[key])
    return f"{path} = {str(holder[key])[:40]!a}"


def _nearby(rng: random.Random, value: Any) -> Any:
    """Something like a value, or something odd."""
    if type(value) is int and rng.random() < 0.5:
        return value + rng.choice([-32, -2, -1, 1, 2, 32, value])
    if isinstance(value, str) and rng.random() < 0.5:
        return rng.choice(WORDS)
    return rng.choice(ODD)


def _swap(rng: random.Random, header: dict[str, Any]) -> str:
    """Damage that keeps a header's grammar: entries or their fields exchanged, renamed or doubled, other dtypes."""
    names = [name for name in header if name != "__metadata__"]
    if not names:
        return "nothing"
    one, two = rng.choice(names), rng.choice(names)
    shape = header[one].get("shape") if isinstance(header[one], dict) else None
    shape = shape if isinstance(shape, list) else []
    action = rng.choice(["exchanged", "offsets", "doubled", "dtype", "renamed", "reshaped", "transposed"])
    if action == "exchanged":
        header[one], header[two] = header[two], header[one]
    elif not isinstance(header[one], dict) or not isinstance(header[two], dict):
        return "nothing"
    elif action == "offsets":
        header[one]["data_offsets"] = header[two].get("data_offsets")
    elif action == "doubled":
        header[f"{one}.bias"] = dict(header[one])
    elif action == "dtype":
        header[one]["dtype"] = rng.choice(["F16", "BF16", "F32", "I16", "U8", "F8_E4M3", "I32", "BOOL"])
    elif action == "renamed":
        header[re.sub(r"\d", "7", one) if rng.random() < 0.5 else two + "x"] = header.pop(one)
    elif action == "reshaped":
        header[one]["shape"] = rng.choice([[1, *shape], [0], [], [2**40, 0, 2**40]])
    else:
        header[one]["shape"] = shape[::-1]
    return f"{one} {action} ({two})"


def _edited(rng: random.Random, raw: bytes) -> tuple[bytes, str]:
    """Bytes with a few of them changed, inserted, removed or repeated."""
    if not raw:
        return rng.randbytes(4), "4 random bytes"
    place, length = rng.randrange(len(raw)), rng.choice([1, 1, 1, 2, 4, 9])
    action = rng.choice(["changed", "changed", "inserted", "removed", "repeated", "largest"])
    after = raw[place + length :]
    new = {
        "changed": rng.randbytes(min(length, len(raw) - place)) + after,
        "inserted": rng.randbytes(length) + raw[place:],
        "removed": after,
        "repeated": raw[place : place + 64] + raw[place:],
        "largest": b"\xff" * min(length, len(raw) - place) + after,
    }[action]
    return raw[:place] + new, f"{length} bytes {action} at {place}"


def _dumped(tree: Any) -> bytes:
    """JSON, with what stands for deep nesting put in."""
    return json.dumps(tree).replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000).encode()
