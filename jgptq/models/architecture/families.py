"""Architectures as a table: a row holds all that is special to a family, and nothing else does.

A row says which keys of a `config.json` set the decoder's switches, which switches all models of the family share, and what the
modules are called in a checkpoint. A new architecture whose computation the switches of `ModelConfig` describe is one more row.
"""

import difflib
import reprlib
from collections.abc import Mapping
from typing import Any

from jgptq.errors import ArchitectureError
from jgptq.models.architecture.row import Family
from jgptq.models.architecture.rows import cohere, gemma, layer_norm, llama, olmo

FAMILIES: Mapping[str, Family] = {**llama.ROWS, **olmo.ROWS, **gemma.ROWS, **cohere.ROWS, **layer_norm.ROWS}

SWITCHES: Mapping[str, tuple[Any, ...]] = {
    "alibi": (False,),
    "attention_multiplier": (1.0,),
    "attention_out_bias": (False,),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "embedding_multiplier": (1.0,),
    "final_logit_softcapping": (),
    "logit_scale": (1.0,),
    "logits_scaling": (1.0,),
    "lm_head_multiplier": (1.0,),
    "no_rope_layers": (),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "parallel_attn": (False,),
    "qk_layernorm": (False,),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1.0,),
    "rope_local_base_freq": (),
    "rotary_pct": (1.0,),
    "tie_word_embeddings": (False,),
    "use_bidirectional_attention": (False,),
    "use_bias": (False,),
    "use_gated_activation": (True,),
    "use_parallel_block": (True,),
    "use_parallel_residual": (False,),
    "use_qk_norm": (False,),
    "use_qkv_bias": (False,),
}
"""Keys by which configs of other architectures change the computation, with values that change nothing (as null does). Where a
row does not read such a key, another value is refused by name."""


def family_of(model_type: str) -> Family:
    """The row of an architecture.

    Raises:
      ArchitectureError: there is none; the message lists those known, and the nearest of them.
    """
    if model_type not in FAMILIES:
        raise ArchitectureError(unknown(model_type))
    return FAMILIES[model_type]


def unknown(model_type: str) -> str:
    """The message for an architecture that has no row."""
    near = difflib.get_close_matches(model_type[:40], FAMILIES)
    nearest = f"; the nearest is {' or '.join(near)}" if near else ""
    return f"config.json: architecture {reprlib.repr(model_type)} is not known; known are {', '.join(FAMILIES)}{nearest}"


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
        return f"{family.decoder}.{family.blocks}.{index}.{family.modules.get(within, within)}"
    return f"{family.decoder}.{family.modules.get(path, path)}"
