"""Architectures as a table: a row holds all that is special to a family, and nothing else does.

A row says which keys of a `config.json` set the decoder's switches, which switches all models of the family share, and what the
modules are called in a checkpoint. A new architecture whose computation the switches of `ModelConfig` describe is one more row.
"""

import difflib
import re
import reprlib
from collections.abc import Mapping
from typing import Any

from jgptq.errors import ArchitectureError
from jgptq.models.architecture.row import Family
from jgptq.models.architecture.rows import cohere, experts, falcon, fused, fused_gate, gemma, layer_norm, llama, olmo

FAMILIES: Mapping[str, Family] = {
    **llama.ROWS,
    **olmo.ROWS,
    **gemma.ROWS,
    **cohere.ROWS,
    **layer_norm.ROWS,
    **fused.ROWS,
    **fused_gate.ROWS,
    **falcon.ROWS,
    **experts.ROWS,
}

SWITCHES: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "alibi": (False,),
    "apply_residual_connection_post_layernorm": (False,),
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
    "reorder_and_upcast_attn": (False,),
    "residual_multiplier": (1.0,),
    "rope_local_base_freq": (),
    "rotary_pct": (1.0,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "scale_attn_weights": (True,),
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
    """The row of a name in `FAMILIES`.

    Raises:
      ArchitectureError: there is none; the message lists the architectures known, and the nearest of them.
    """
    if model_type not in FAMILIES:
        raise ArchitectureError(_unknown(model_type))
    return FAMILIES[model_type]


def file_type(model_type: str) -> str:
    """The `model_type` of the files of a row: not its name where several rows are forms of one architecture."""
    return family_of(model_type).model_type or model_type


def row_of(hf: Mapping[str, Any]) -> str:
    """The name of the row that describes a `config.json`.

    Raises:
      ArchitectureError: an unknown architecture, or a form of it that no row describes.
    """
    model_type = str(hf.get("model_type"))
    rows = {name: family for name, family in FAMILIES.items() if file_type(name) == model_type}
    if not rows:
        code = ". It names code of its own (auto_map), which is never run" if "auto_map" in hf else ""
        raise ArchitectureError(_unknown(model_type) + code)
    for name, family in rows.items():
        if all(hf.get(key) in values for key, values in family.where.items()):
            return name
    keys = dict.fromkeys(key for family in rows.values() for key in family.where)
    form = ", ".join(f"{key} {reprlib.repr(hf.get(key))}" for key in keys)
    raise ArchitectureError(f"config.json: not implemented for architecture {model_type!r}: {form} together")


def _unknown(model_type: str) -> str:
    """The message for an architecture that has no row."""
    known = dict.fromkeys(family.model_type or name for name, family in FAMILIES.items())
    near = difflib.get_close_matches(model_type[:40], known)
    nearest = f"; the nearest is {' or '.join(near)}" if near else ""
    return f"config.json: architecture {reprlib.repr(model_type)} is not known; known are {', '.join(known)}{nearest}"


def checkpoint_name(path: str, model_type: str) -> str:
    """The name in a checkpoint of the module at a path in the decoder; rules, reports and files speak of modules by it.

    Args:
      path: dotted, such as `layers.0.mlp.up_proj`, `norm` or `lm_head`.
      model_type: the architecture, a key of `FAMILIES`.

    Returns:
      The name, such as `model.layers.0.mlp.up_proj`, or `model.decoder.layers.0.fc1` in an OPT.

    Raises:
      ArchitectureError: an unknown architecture.
    """
    family = family_of(model_type)
    if path == "lm_head":
        return family.head
    if path.startswith("layers."):
        _, index, within = path.split(".", 2)
        return f"{family.decoder}.{family.blocks}.{index}.{_name_within(within, family)}"
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
