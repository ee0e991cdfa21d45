"""Folder or hub id -> decoder. Leaves are views of the mapped shards; nothing is read before it is used."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import jax
import numpy as np
from flax import nnx

from converters.checkpoint import Checkpoint, open_checkpoint
from converters.contradictions import check_depth, refuse, unexpected
from converters.expert_names import with_single_experts
from converters.formats import Reader, reader_of
from converters.names import Holder, NameRule, leaves, named_as_here, stored_rule, unit_leaves
from converters.orbax import load_orbax_folder
from converters.output.folders import ORBAX
from converters.parted import with_gate_and_up_joined
from converters.reading.hub import resolve_folder
from converters.reading.json_file import read_json
from jgptq.errors import CheckpointError
from jgptq.models import Decoder, ModelConfig, Origin, Unit, checkpoint_name, config_from_hf
from jgptq.models.architecture import typed
from jgptq.models.memory import copy_module
from jgptq.models.packed import PackedTensor, validate

Leaf = np.ndarray | PackedTensor


def load_hf(source: str | Path, dtype: str = "auto", revision: str | None = None) -> Decoder:
    """Loads a Hugging Face checkpoint, float or of one of the quantized formats (`converters.formats`), as a Flax decoder.

    Args:
      source: a folder, or a hub id such as "HuggingFaceTB/SmolLM2-135M".
      dtype: what activations are computed in: "float32", "bfloat16", or "auto" for the checkpoint's own (float16 computes in
        float32). Leaves keep the dtype of the file.
      revision: branch, tag or commit of the hub's repository; None for its main branch.

    Returns:
      The decoder. Its leaves are memory-mapped views in Flax layout, its `origin` says where it came from, and `quantization` is
      set where the checkpoint is quantized.

    Raises:
      CheckpointError: files that are missing or damaged; tensors that are missing, unexpected or of a wrong shape, all at once.
      ArchitectureError: an architecture or a quantization method that is not implemented.
    """
    folder = resolve_folder(source, revision)
    if (folder / ORBAX).is_dir():
        return load_orbax_folder(folder, dtype)
    hf = read_json(folder / "config.json")
    config = config_from_hf(hf, dtype)
    quantization = hf.pop("quantization_config", None)
    if quantization is None and (folder / "quantize_config.json").exists():
        quantization = {"quant_method": "gptq"} | read_json(folder / "quantize_config.json")
        typed.refuse(typed.problems(quantization, typed.QUANTIZATION, typed.QUANTIZATION), "quantize_config.json")
    reader = None if quantization is None else reader_of(quantization)
    checkpoint = with_single_experts(named_as_here(open_checkpoint(folder), config.model_type), config)
    if reader is not None and config.gate_up_fused:
        checkpoint = with_gate_and_up_joined(checkpoint)
    check_depth(checkpoint, config)
    decoder = nnx.eval_shape(lambda: Decoder(config, rngs=cast(nnx.Rngs, _OneKey())))
    used, problems = _fill(leaves(decoder), checkpoint, config, reader)
    refuse(checkpoint, config, problems + unexpected(checkpoint, config, used, None if reader is None else reader.required[0]))
    decoder.origin = Origin(folder=str(folder), hf_config=json.dumps(hf))
    decoder.quantization = None if reader is None else reader.settings
    return decoder


class _OneKey:
    """The random numbers of a decoder that is only traced for its shapes: one key for all, because flax's own counters take time
    that grows with the square of the number of blocks."""

    def __init__(self) -> None:
        self._key = jax.random.key(0)

    def params(self) -> jax.Array:
        """The key of any parameter."""
        return self._key


def load_unit(index: int, unit: Unit, checkpoint: Checkpoint, reader: Reader) -> Unit:
    """One block of a checkpoint that may not be whole yet, or the head that follows the last one.

    Args:
      index: which block; the number of blocks for the head.
      unit: the float one, whose shapes the tensors must have. What a head reads through is shared with it.
      checkpoint: the tensors.
      reader: of the format that the tensors were written in.
    """
    stored = copy_module(unit)
    _, problems = _fill(unit_leaves(index, stored), checkpoint, stored.config, reader)
    refuse(checkpoint, stored.config, problems)
    return stored


def _fill(
    targets: Iterable[tuple[str, Holder, str]],
    checkpoint: Checkpoint,
    config: ModelConfig,
    reader: Reader | None,
) -> tuple[set[str], list[str]]:
    """Sets the leaves of abstract modules from a checkpoint; returns the names that were used, and a sentence a problem."""
    used: set[str] = set()
    problems: list[str] = []
    for path, module, attribute in targets:
        param = getattr(module, attribute)
        shape = tuple(param.get_value().shape)
        name = checkpoint_name(path, config.model_type)
        read: Leaf | None
        if attribute == "kernel" and reader is not None and f"{name}.{reader.required[0]}" in checkpoint.entries:
            read = _packed(name, shape, checkpoint, reader, used, problems)
        else:
            read = _float(name, stored_rule(path, attribute, config.model_type), shape, checkpoint, used, problems)
        if read is not None:
            setattr(module, attribute, nnx.Param(read))
    return used, problems


def _float(
    module: str, rule: NameRule, shape: tuple[int, ...], checkpoint: Checkpoint, used: set[str], problems: list[str]
) -> np.ndarray | None:
    """A float leaf in Flax layout, or None with its problem noted."""
    name = f"{module}.{rule.suffix}"
    stored = shape[::-1] if rule.transposed else shape
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
    return array.T if rule.transposed else array


def _packed(
    name: str, shape: tuple[int, int], checkpoint: Checkpoint, reader: Reader, used: set[str], problems: list[str]
) -> PackedTensor | None:
    """A packed kernel, or None with its problems noted."""
    stored = [part for part in (*reader.required, *reader.optional) if f"{name}.{part}" in checkpoint.entries]
    missing = [part for part in reader.required if part not in stored]
    if missing:
        problems.extend(f"  {name}.{part} is missing, although {name}.{reader.required[0]} is there" for part in missing)
        return None
    used.update(f"{name}.{part}" for part in stored)
    try:
        packed = reader.decode(name, shape, {part: checkpoint.array(f"{name}.{part}") for part in stored})
        validate(packed, name)
    except CheckpointError as error:
        problems.append(f"  {error}")
        return None
    return packed
