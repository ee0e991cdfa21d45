"""Architectures as a table: a row holds all that is special to a family, and nothing else does.

A row says which keys of a `config.json` set the decoder's switches, which switches all models of the family share, and what the
modules are called in a checkpoint. A new architecture whose computation the switches of `ModelConfig` describe is one more row.
"""

import re
from collections.abc import Mapping
from typing import Any

from jgptq.errors import ArchitectureError
from jgptq.models.architecture.row import Family
from jgptq.models.architecture.rows import experts, gemma, layer_norm, llama

FAMILIES: Mapping[str, Family] = {**llama.ROWS, **gemma.ROWS, **layer_norm.ROWS, **experts.ROWS}

SWITCHES: Mapping[str, tuple[Any, ...]] = {
    "alibi": (False,),
    "attention_multiplier": (1.0,),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "embedding_multiplier": (1.0,),
    "final_logit_softcapping": (),
    "logit_scale": (1.0,),
    "logits_scaling": (1.0,),
    "lm_head_multiplier": (1.0,),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "parallel_attn": (False,),
    "qk_layernorm": (False,),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1.0,),
    "rotary_pct": (1.0,),
    "use_bidirectional_attention": (False,),
    "use_parallel_residual": (False,),
    "use_qkv_bias": (False,),
}
"""Keys by which configs of other architectures change the computation, with values that change nothing (as null does). Where a
row does not read such a key, another value is refused by name."""


def family_of(model_type: str) -> Family:
    """The row of an architecture.

    Raises:
      ArchitectureError: there is none; the message lists those known.
    """
    if model_type not in FAMILIES:
        raise ArchitectureError(f"config.json: architecture {model_type!r} is not known; known are {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def checkpoint_name(path: str, model_type: str) -> str:
    """The name in a checkpoint of the module at a path in the decoder; rules, reports and files speak of modules by it.

    Args:
      path: dotted, such as `layers.0.mlp.up_proj`, `norm` or `lm_head`.
      model_type: the architecture.

    Returns:
      The name, such as `model.layers.0.mlp.up_proj`, or `model.decoder.layers.0.fc1` in an OPT.

    Raises:
      ArchitectureError: an unknown architecture.
    """
    family = family_of(model_type)
    if path == "lm_head":
        return path
    if path.startswith("layers."):
        _, index, within = path.split(".", 2)
        return f"{family.decoder}.layers.{index}.{_name_within(within, family)}"
    return f"{family.decoder}.{family.modules.get(path, path)}"


def _name_within(path: str, family: Family) -> str:
    """The name within a block. The row names an expert's linears once, with a star for the number of the expert."""
    if path in family.modules:
        return family.modules[path]
    expert = _EXPERT.fullmatch(path)
    if expert is None:
        return path
    kind = f"{expert[1]}.*.{expert[3]}"
    return family.modules.get(kind, kind).replace("*", expert[2])


_EXPERT = re.compile(r"(mlp\.experts)\.(\d+)\.(\w+)")
