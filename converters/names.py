"""The leaves of a decoder, and how a checkpoint stores each kind of leaf. Names of modules are the family's
(`jgptq.models.checkpoint_name`)."""

import dataclasses
from collections.abc import Iterator

from flax import nnx

from converters.checkpoint import Checkpoint
from jgptq.models import FAMILIES, Decoder, Expert, ExpertLinear, Head, Unit, single_linears

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
"""Last part of a leaf's path -> how most families store it."""

IGNORED = (".rotary_emb.inv_freq", ".self_attn.masked_bias")
"""Endings of tensors that old checkpoints of any family hold and no model reads."""


def stored_rule(path: str, attribute: str, model_type: str) -> NameRule:
    """How the leaf of a module is stored by an architecture.

    Args:
      path: of the module in the decoder.
      attribute: the leaf, a key of `LEAVES`.
      model_type: the architecture, a key of `FAMILIES`.
    """
    rule = LEAVES[attribute]
    if attribute == "kernel" and path.startswith("layers.") and FAMILIES[model_type].conv1d:
        return dataclasses.replace(rule, transposed=False)
    return rule


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


def named_as_here(checkpoint: Checkpoint, model_type: str) -> Checkpoint:
    """The checkpoint by the names that the family's files have today.

    Old files of some families lack the prefix of the whole model, as in `h.0.ln_1.weight` for `transformer.h.0.ln_1.weight`. An
    output projection that the family's files do not call `lm_head` has that name in the modules of transformers, and in files of
    programs that write those.

    Args:
      checkpoint: the tensors by the names of the files.
      model_type: the architecture, a key of `FAMILIES`.
    """
    family = FAMILIES[model_type]
    whole, _, rest = f"{family.decoder}.{family.blocks}.".partition(".")
    prefix, head = f"{whole}.", f"{family.head}."

    def begins(start: str) -> bool:
        return any(name.startswith(start) for name in checkpoint.entries)

    bare, headless = begins(rest) and not begins(prefix), not begins(head)

    def named(name: str) -> str:
        if headless and name.startswith("lm_head."):
            return head + name.removeprefix("lm_head.")
        return prefix + name if bare and not name.startswith(head) else name

    return Checkpoint(checkpoint.folder, {named(name): entry for name, entry in checkpoint.entries.items()})
