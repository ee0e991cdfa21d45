"""Files that hold experts as transformers does in memory, read as if they held them one by one: nothing is copied."""

import dataclasses
import re
from collections.abc import Iterator

from converters.checkpoint import Checkpoint
from converters.reading.entry import DTYPES, TensorEntry
from jgptq.errors import CheckpointError
from jgptq.models import ModelConfig, checkpoint_name

_FUSED = re.compile(r"(?P<before>.*\.layers\.(?P<block>\d+)\.)mlp\.experts\.(?P<part>gate_up_proj|down_proj)")
_SINGLE = re.compile(r".*\.layers\.(?P<block>\d+)\.mlp\.(?P<within>gate|experts\.\d+\.(?:gate|up|down)_proj)\.(?P<suffix>\w+)")
_ROUTER = {"gate": "router"}


def with_single_experts(checkpoint: Checkpoint, config: ModelConfig) -> Checkpoint:
    """The checkpoint with every tensor of all experts replaced by one tensor for each expert and linear.

    transformers keeps experts as `experts.gate_up_proj` `[E, 2I, D]` and `experts.down_proj` `[E, D, I]` in memory, and some
    programs write them so. It has one name for the modules of all families there, which GPTQModel writes for Mixtral as well.

    Args:
      checkpoint: the tensors of a folder.
      config: the decoder's switches.

    Raises:
      CheckpointError: a tensor whose shape is not that of all experts.
    """
    if config.experts is None:
        return checkpoint
    entries: dict[str, TensorEntry] = {}
    for name, entry in checkpoint.entries.items():
        if fused := _FUSED.fullmatch(name):
            entries |= _split(name, entry, int(fused["block"]), fused["part"], config)
        elif single := _SINGLE.fullmatch(name):
            path = f"layers.{single['block']}.mlp.{_ROUTER.get(single['within'], single['within'])}"
            entries[f"{checkpoint_name(path, config.model_type)}.{single['suffix']}"] = entry
        else:
            entries[name] = entry
    return Checkpoint(checkpoint.folder, entries)


def _split(name: str, entry: TensorEntry, block: int, part: str, config: ModelConfig) -> Iterator[tuple[str, TensorEntry]]:
    """The entries of the linears in a tensor `[E, N, K]`: those of an expert lie one after the other."""
    assert config.experts is not None
    experts, inner, width = config.experts.num_experts, config.experts.width, config.hidden_size
    linears = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
    n, k = (inner, width) if part == "gate_up_proj" else (width, inner)
    if entry.shape != (experts, n * len(linears), k):
        expected = [experts, n * len(linears), k]
        raise CheckpointError(f"{entry.file}: {name} has shape {list(entry.shape)}, expected {expected}; check config.json")
    itemsize = DTYPES[entry.dtype].itemsize
    across, down, _ = strides = (n * len(linears) * k, k, 1) if entry.strides is None else entry.strides
    for index in range(experts * len(linears)):
        expert, linear = divmod(index, len(linears))
        path = f"layers.{block}.mlp.experts.{expert}.{linears[linear]}"
        full = f"{checkpoint_name(path, config.model_type)}.weight"
        start = entry.start + (expert * across + linear * n * down) * itemsize
        kept = None if entry.strides is None else strides[1:]
        yield full, dataclasses.replace(entry, shape=(n, k), start=start, strides=kept)
