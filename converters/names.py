"""The leaves of a decoder, and how a checkpoint stores each kind of leaf. Names of modules are the family's
(`jgptq.models.checkpoint_name`)."""

import dataclasses
from collections.abc import Iterator

from flax import nnx

from jgptq.models import Decoder, Expert, ExpertLinear, Head, Unit, single_linears

Holder = nnx.Module | Expert
"""What has a leaf as an attribute."""


@dataclasses.dataclass(frozen=True)
class NameRule:
    """How leaves of one kind are stored."""

    suffix: str  # last part of the Hugging Face name
    transposed: bool  # Torch keeps a linear's weight as [N, K]


LEAVES = {
    "kernel": NameRule("weight", transposed=True),
    "bias": NameRule("bias", transposed=False),
    "scale": NameRule("weight", transposed=False),
    "e_score_correction_bias": NameRule("e_score_correction_bias", transposed=False),
    "embedding": NameRule("weight", transposed=False),
}
"""Last part of a leaf's path -> how it is stored."""

IGNORED = (".rotary_emb.inv_freq", ".self_attn.masked_bias")
"""Endings of tensors that old checkpoints hold and no model reads."""


def leaves(decoder: Decoder) -> Iterator[tuple[str, Holder, str]]:
    """Every leaf of a decoder in the order of the forward pass, as (path of its module, module, attribute)."""
    blocks = {f"layers.{index}": block for index, block in enumerate(decoder.layers)}
    for path, part in (decoder.before() | blocks | decoder.after()).items():
        yield from _walk(path, part)


def unit_leaves(index: int, unit: Unit) -> Iterator[tuple[str, Holder, str]]:
    """The leaves of one block, or of the head's projection, with the paths that they have in the decoder."""
    return _walk("lm_head", unit.lm_head) if isinstance(unit, Head) else _walk(f"layers.{index}", unit)


def _walk(path: str, module: nnx.Module) -> Iterator[tuple[str, Holder, str]]:
    if isinstance(module, ExpertLinear):  # files hold the linears of the experts one by one
        for single, expert in single_linears(path, module):
            yield from ((single, expert, name) for name, value in vars(module).items() if isinstance(value, nnx.Param))
        return
    for attribute, value in vars(module).items():
        if isinstance(value, nnx.Param):
            yield path, module, attribute
        elif isinstance(value, nnx.Module):
            yield from _walk(f"{path}.{attribute}", value)
