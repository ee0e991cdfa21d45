"""What a `config.json` says of a model against the tensors that its folder holds."""

import re

import numpy as np

from converters.checkpoint import Checkpoint
from converters.names import IGNORED
from jgptq.errors import CheckpointError
from jgptq.models import FAMILIES, ModelConfig, checkpoint_name, file_type

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
_ROWS = 1024  # that are compared at a time
_LISTED = 40  # problems in a message


def check_depth(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Compares the number of blocks with the tensors' names, before anything of that number is built.

    Raises:
      CheckpointError: they differ; names both.
    """
    before, _, _ = checkpoint_name("layers.0.block", config.model_type).partition(".0.")
    pattern = re.compile(rf"{re.escape(before)}\.(\d{{1,9}})\.")
    indices = {int(match[1]) for name in checkpoint.entries if (match := pattern.match(name))}
    blocks = config.num_hidden_layers
    if len(indices) == blocks and max(indices) == blocks - 1:
        return
    held = f"{len(indices)}, up to {before}.{max(indices)}" if indices else f"none, no name begins with {before}.0"
    key = FAMILIES[config.model_type].keys["num_hidden_layers"].name
    raise CheckpointError(
        f"{checkpoint.folder}: config.json has {key} {blocks}, the tensors are those of another number of blocks: {held}; "
        "is a shard missing, or is the config another model's?"
    )


def unexpected(checkpoint: Checkpoint, config: ModelConfig, used: set[str], codes: str | None) -> list[str]:
    """A sentence for each tensor that the model does not have, apart from those that no model reads.

    Args:
      checkpoint: the tensors.
      config: the decoder's switches.
      used: the names that the decoder has taken.
      codes: the part that holds the codes of a packed linear, such as "qweight"; None in a float checkpoint.
    """
    head = f"{checkpoint_name('lm_head', config.model_type)}.weight"
    tied = {head} if config.tie_word_embeddings else set()
    foreign = sorted(checkpoint.entries.keys() - used - tied)
    constants = IGNORED + FAMILIES[config.model_type].buffers
    problems = [
        f"  {name} is none of a {file_type(config.model_type)}"
        for name in foreign
        if not _leftover(name, checkpoint, constants, codes)
    ]
    embedding = f"{checkpoint_name('embed_tokens', config.model_type)}.weight"
    if tied & checkpoint.entries.keys() and embedding in used and not _same(checkpoint, embedding, head):
        problems.append(f"  {head} differs from {embedding}, and config.json has tie_word_embeddings true")
    return problems


def refuse(checkpoint: Checkpoint, config: ModelConfig, problems: list[str]) -> None:
    """Raises all contradictions as one error, which also says what the config is.

    Raises:
      CheckpointError: there are any.
    """
    if not problems:
        return
    keys = FAMILIES[config.model_type].keys
    sizes = ", ".join(f"{keys[size].name if size in keys else size} {getattr(config, size)}" for size in _SIZES)
    listed = problems[:_LISTED] + ([f"  and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else [])
    raise CheckpointError(
        f"{checkpoint.folder}: {len(problems)} tensors do not fit config.json, a {file_type(config.model_type)} of {sizes}:\n"
        + "\n".join(listed)
    )


def _same(checkpoint: Checkpoint, one: str, two: str) -> bool:
    """Whether two tensors are the same, compared by some rows at a time."""
    left, right = checkpoint.entries[one], checkpoint.entries[two]
    if left == right:
        return True
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    first, second = checkpoint.array(one), checkpoint.array(two)
    parts = (slice(at, at + _ROWS) for at in range(0, left.shape[0], _ROWS))
    return all(first[part].tobytes() == second[part].tobytes() for part in parts)


def _leftover(name: str, checkpoint: Checkpoint, constants: tuple[str, ...], codes: str | None) -> bool:
    """Whether a tensor that the model does not have may be ignored: constants, and biases of zeros next to codes."""
    module, _, part = name.rpartition(".")
    added = part == "bias" and f"{module}.{codes}" in checkpoint.entries and not np.any(checkpoint.array(name))
    return added or name.endswith(constants)
