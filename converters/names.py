"""Hugging Face tensor name <-> path of a leaf in the decoder, per architecture: data, and the two functions that read it."""

import dataclasses
from collections.abc import Iterator

from flax import nnx

from jgptq.errors import ArchitectureError
from jgptq.models import Decoder, Head, Unit


@dataclasses.dataclass(frozen=True)
class NameRule:
    """How leaves of one kind are stored."""

    suffix: str  # last part of the Hugging Face name
    transposed: bool  # Torch keeps a linear's weight as [N, K]


LEAVES = {
    "kernel": NameRule("weight", transposed=True),
    "bias": NameRule("bias", transposed=False),
    "scale": NameRule("weight", transposed=False),
    "embedding": NameRule("weight", transposed=False),
}
"""Last part of a leaf's path -> how it is stored."""

_LLAMA = {"embed_tokens": "model.embed_tokens", "layers": "model.layers", "norm": "model.norm", "lm_head": "lm_head"}

MODULES = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA}
"""Architecture -> first part of a module's path in the decoder -> its name in the file; the rest of the path is the same."""

IGNORED = (".rotary_emb.inv_freq", ".self_attn.masked_bias")
"""Endings of tensors that old checkpoints hold and no model reads."""


def hf_module(path: str, architecture: str) -> str:
    """The Hugging Face name of the module at a dotted path: `layers.0.mlp.up_proj` -> `model.layers.0.mlp.up_proj`.

    Raises:
      ArchitectureError: an architecture without a table.
    """
    if architecture not in MODULES:
        raise ArchitectureError(f"no table of names for {architecture!r}; there are tables for {', '.join(MODULES)}")
    first, dot, rest = path.partition(".")
    return MODULES[architecture][first] + dot + rest


def leaves(decoder: Decoder) -> Iterator[tuple[str, nnx.Module, str]]:
    """Every leaf of a decoder in the order of the forward pass, as (path of its module, module, attribute)."""
    yield from _walk("embed_tokens", decoder.embed_tokens)
    for index, block in enumerate(decoder.layers):
        yield from _walk(f"layers.{index}", block)
    yield from _walk("norm", decoder.norm)
    if decoder.lm_head is not None:
        yield from _walk("lm_head", decoder.lm_head)


def unit_leaves(index: int, unit: Unit) -> Iterator[tuple[str, nnx.Module, str]]:
    """The leaves of one block, or of the head's projection, with the paths that they have in the decoder."""
    return _walk("lm_head", unit.lm_head) if isinstance(unit, Head) else _walk(f"layers.{index}", unit)


def _walk(path: str, module: nnx.Module) -> Iterator[tuple[str, nnx.Module, str]]:
    for attribute, value in vars(module).items():
        if isinstance(value, nnx.Param):
            yield path, module, attribute
        elif isinstance(value, nnx.Module):
            yield from _walk(f"{path}.{attribute}", value)
