"""Folder or hub id -> decoder. Leaves are views of the mapped shards; nothing is read before it is used."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from converters.checkpoint import Checkpoint, open_checkpoint, read_json, resolve_folder
from converters.encode import constant_words
from converters.expert_names import with_single_experts
from converters.names import IGNORED, LEAVES, Holder, leaves, unit_leaves
from converters.quantization import declared_group_sizes, read_settings
from jgptq.errors import ArchitectureError, CheckpointError
from jgptq.models import Decoder, ModelConfig, Origin, Unit, checkpoint_name, config_from_hf
from jgptq.models.memory import copy_module
from jgptq.models.packed import PackedTensor, validate
from jgptq.settings.sizes import BITS, group_rows
from pallas_kernels.packing import pack_codes, unpack_codes

Leaf = np.ndarray | PackedTensor


def load_hf(source: str | Path, dtype: str = "auto") -> Decoder:
    """Loads a Hugging Face checkpoint, float or GPTQ (v1 and v2), as a Flax decoder.

    Args:
      source: a folder, or a hub id such as "HuggingFaceTB/SmolLM2-135M".
      dtype: what activations are computed in: "float32", "bfloat16", or "auto" for the checkpoint's own (float16 computes in
        float32). Leaves keep the dtype of the file.

    Returns:
      The decoder. Its leaves are memory-mapped views in Flax layout, its `origin` says where it came from, and `quantization` is
      set where the checkpoint is quantized.

    Raises:
      CheckpointError: files that are missing or damaged; tensors that are missing, unexpected or of a wrong shape, all at once.
      ArchitectureError: an architecture or a quantization method that is not implemented.
    """
    folder = resolve_folder(source)
    hf = read_json(folder / "config.json")
    quantization = hf.pop("quantization_config", None)
    if quantization is None and (folder / "quantize_config.json").exists():
        quantization = {"quant_method": "gptq"} | read_json(folder / "quantize_config.json")
    quantization = None if quantization is None else _check_method(quantization)
    config = config_from_hf(hf, dtype)
    checkpoint = with_single_experts(open_checkpoint(folder), config)
    decoder = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    used = _fill(leaves(decoder), checkpoint, config, quantization)
    unexpected = [name for name in checkpoint.entries if name not in used and not _leftover(name, checkpoint)]
    if config.tie_word_embeddings:
        unexpected = [name for name in unexpected if name != "lm_head.weight"]
    if unexpected:
        listed = ", ".join(sorted(unexpected)[:12]) + (", ..." if len(unexpected) > 12 else "")
        raise CheckpointError(
            f"{folder}: {len(unexpected)} tensors that a {config.model_type} does not have: {listed}; check config.json"
        )
    decoder.origin = Origin(folder=str(folder), hf_config=json.dumps(hf))
    decoder.quantization = None if quantization is None else read_settings(quantization)
    return decoder


def _leftover(name: str, checkpoint: Checkpoint) -> bool:
    """Whether a tensor that the model does not have may be ignored: old buffers, and biases of zeros next to codes."""
    module, _, part = name.rpartition(".")
    added = part == "bias" and f"{module}.qweight" in checkpoint.entries and not np.any(checkpoint.array(name))
    return added or name.endswith(IGNORED)


def load_unit(index: int, unit: Unit, checkpoint: Checkpoint, quantization: dict[str, Any]) -> Unit:
    """One block of a checkpoint that may not be whole yet, or the head that follows the last one.

    Args:
      index: which block; the number of blocks for the head.
      unit: the float one, whose shapes the tensors must have. What a head reads through is shared with it.
      checkpoint: the tensors.
      quantization: the `quantization_config` that the tensors were written under.
    """
    stored = copy_module(unit)
    _fill(unit_leaves(index, stored), checkpoint, stored.config, quantization)
    return stored


def _fill(
    targets: Iterable[tuple[str, Holder, str]],
    checkpoint: Checkpoint,
    config: ModelConfig,
    quantization: dict[str, Any] | None,
) -> set[str]:
    """Sets the leaves of abstract modules from a checkpoint; returns the names that were used, raises all problems at once."""
    used: set[str] = set()
    problems: list[str] = []
    declared = None if quantization is None else declared_group_sizes(quantization)
    for path, module, attribute in targets:
        param = getattr(module, attribute)
        shape = tuple(param.get_value().shape)
        name = checkpoint_name(path, config.model_type)
        read: Leaf | None
        packed = attribute == "kernel" and f"{name}.qweight" in checkpoint.entries
        if packed and quantization is not None and declared is not None:
            read = _packed(name, shape, checkpoint, declared(name), quantization["checkpoint_format"], used, problems)
        else:
            read = _float(f"{name}.{LEAVES[attribute].suffix}", attribute, shape, checkpoint, used, problems)
        if read is not None:
            setattr(module, attribute, nnx.Param(read))
    if problems:
        raise CheckpointError(f"{checkpoint.folder}: {len(problems)} tensors do not fit the config:\n" + "\n".join(problems))
    return used


def _float(
    name: str, attribute: str, shape: tuple[int, ...], checkpoint: Checkpoint, used: set[str], problems: list[str]
) -> np.ndarray | None:
    """A float leaf in Flax layout, or None with its problem noted."""
    transposed = LEAVES[attribute].transposed
    stored = shape[::-1] if transposed else shape
    entry = checkpoint.entries.get(name)
    if entry is None:
        problems.append(f"  {name} is missing, expected {list(stored)}")
        return None
    used.add(name)
    if entry.shape != stored:
        problems.append(f"  {name} has shape {list(entry.shape)}, expected {list(stored)}")
        return None
    if entry.dtype not in ("F16", "BF16", "F32", "F64"):
        problems.append(f"  {name} has dtype {entry.dtype}, expected a float")
        return None
    array = checkpoint.array(name)
    return array.T if transposed else array


def _packed(
    name: str,
    shape: tuple[int, ...],
    checkpoint: Checkpoint,
    declared: int,
    file_format: str,
    used: set[str],
    problems: list[str],
) -> PackedTensor | None:
    """A packed kernel, or None with its problem noted. Bits and group follow from the shapes, whatever the config says; the group
    size that it declares, where that fits them too."""
    k, n = shape
    parts = {
        part: f"{name}.{part}" for part in ("qweight", "scales", "qzeros", "g_idx") if f"{name}.{part}" in checkpoint.entries
    }
    missing = [part for part in ("qweight", "scales", "qzeros") if part not in parts]
    if missing:
        problems.extend(f"  {name}.{part} is missing, although {name}.qweight is there" for part in missing)
        return None
    used.update(parts.values())
    arrays = {part: checkpoint.array(full) for part, full in parts.items()}
    if any(arrays[part].ndim != 2 for part in ("qweight", "scales", "qzeros")):
        problems.append(f"  {name}: qweight, scales and qzeros must be matrices")
        return None
    bits, remainder = divmod(arrays["qweight"].shape[0] * 32, k)
    groups = arrays["scales"].shape[0]
    if remainder or bits not in BITS or groups == 0 or arrays["qzeros"].shape != (groups, n * bits // 32):
        shapes = ", ".join(f"{part} {list(arrays[part].shape)}" for part in ("qweight", "scales", "qzeros"))
        problems.append(f"  {name}: {shapes} fit no width of {BITS} for K={k}, N={n}")
        return None
    group_size = declared if groups == -(-k // group_rows(k, declared)) else (-1 if groups == 1 else k // groups)
    group_index = _group_index(arrays.get("g_idx"), k, group_rows(k, group_size))
    if group_index is not None and (group_index.min() < 0 or group_index.max() >= groups):
        problems.append(f"  {name}.g_idx holds groups {group_index.min()} to {group_index.max()}, there are {groups}")
        return None
    zeros = _zeros(arrays["qzeros"], bits, file_format)
    packed = PackedTensor(
        qweight=arrays["qweight"],
        scales=arrays["scales"],
        zeros=zeros,
        group_index=group_index,
        bits=bits,
        group_size=group_size,
        shape=(k, n),
    )
    try:
        validate(packed, name)
    except CheckpointError as error:
        problems.append(f"  {error}")
        return None
    return packed


def _zeros(stored: np.ndarray, bits: int, checkpoint_format: str) -> np.ndarray | None:
    """Zero points as a `PackedTensor` keeps them: plain (v1 stores one less), and None where all are 2^(bits-1)."""
    first_version = checkpoint_format != "gptq_v2"
    middle = 2 ** (bits - 1) - first_version
    if np.array_equal(stored, constant_words(middle, bits, (stored.shape[0], stored.shape[1] * 32 // bits))):
        return None
    if not first_version:
        return stored
    zero_gn = unpack_codes(jnp.asarray(np.ascontiguousarray(stored.T)), bits).T
    return np.asarray(pack_codes(((zero_gn + 1) % 2**bits).T, bits).T)


def _group_index(g_idx: np.ndarray | None, k: int, rows: int) -> np.ndarray | None:
    """The group of each row, or None where groups are contiguous and whole."""
    contiguous = np.arange(k, dtype=np.int32) // rows
    if g_idx is None or np.array_equal(g_idx, contiguous):
        return None if k % rows == 0 else contiguous
    return np.asarray(g_idx)


def _check_method(quantization: dict[str, Any]) -> dict[str, Any]:
    """The quantization config, with what this module reads from it filled in and checked."""
    method = quantization.get("quant_method")
    if method != "gptq":
        raise ArchitectureError(
            f"config.json: quantization method {method!r} cannot be read; expected 'gptq' or a float checkpoint"
        )
    version = quantization.get("checkpoint_format") or quantization.get("format") or "gptq"
    if version not in ("gptq", "gptq_v2"):
        raise ArchitectureError(f"config.json: checkpoint_format {version!r} cannot be read; expected 'gptq' or 'gptq_v2'")
    group_size = quantization.get("group_size")
    if (
        not isinstance(quantization.get("bits"), int)
        or not isinstance(group_size, int)
        or not (group_size == -1 or group_size > 0)
    ):
        raise CheckpointError("config.json: quantization_config needs bits and group_size as integers; fetch the file again")
    return quantization | {"checkpoint_format": version}
