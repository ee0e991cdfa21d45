"""The forms of Falcon (arXiv 2311.16867), which differ in heads and norms."""

from collections.abc import Mapping
from typing import Any

from jgptq.models.architecture.row import Family, Key
from jgptq.models.architecture.rows.common import LLAMA_NORMS, SIZES
from jgptq.models.architecture.rows.fused import DENSE, LAYER_NORM

_PARALLEL = Key("parallel_attn", True, {True: "parallel", False: "pre"})
_KV_HEADS = Key("num_kv_heads", None)


def _falcon(
    where: Mapping[str, tuple[Any, ...]],
    keys: Mapping[str, Key],
    fixed: Mapping[str, Any],
    norms: Mapping[str, str] = LLAMA_NORMS,
) -> Family:
    """A form: the keys that say so, those that only it reads, and its switches and norms."""
    return Family(
        hf_class="FalconForCausalLM",
        model_type="falcon",
        where=where,
        keys=SIZES
        | {
            "intermediate_size": Key("ffn_hidden_size", None),  # None: 4 * hidden_size
            "hidden_size": Key("hidden_size", aliases=("n_embed",)),
            "hidden_act": Key("activation", "gelu"),
            "norm_eps": Key("layer_norm_epsilon", 1e-5),
            "qkv_bias": Key("bias", False),
            "o_bias": Key("bias", False),
            "mlp_bias": Key("bias", False),
            "tie_word_embeddings": Key("tie_word_embeddings", True),
        }
        | dict(keys),
        fixed={**LAYER_NORM, "qkv_layout": "grouped", **fixed},
        positions=Key("alibi", False, {False: "rotary", True: "alibi"}),
        alibi={"scaled": True, "dtype": "bfloat16"},
        decoder="transformer",
        blocks="h",
        modules={
            **norms,
            **DENSE,
            "embed_tokens": "word_embeddings",
            "norm": "ln_f",
            "self_attn.qkv_proj": "self_attention.query_key_value",
        },
    )


_OLD: Mapping[str, tuple[Any, ...]] = {"new_decoder_architecture": (False, None), "num_ln_in_parallel_attn": (None, 1)}
_NEW: Mapping[str, tuple[Any, ...]] = {"new_decoder_architecture": (True,), "parallel_attn": (True, None)}

ROWS: Mapping[str, Family] = {
    "falcon": _falcon(
        {**_OLD, "multi_query": (True, None)},
        {"block_form": _PARALLEL},
        {"num_key_value_heads": 1},
    ),
    "falcon_multi_head": _falcon({**_OLD, "multi_query": (False,)}, {"block_form": _PARALLEL}, {}),
    "falcon_grouped": _falcon(
        {**_NEW, "num_ln_in_parallel_attn": (2, None)},
        {"num_key_value_heads": _KV_HEADS},
        {"block_form": "parallel_two_norms"},
        {"attn_norm": "ln_attn", "mlp_norm": "ln_mlp"},
    ),
    "falcon_grouped_one_norm": _falcon(
        {**_NEW, "num_ln_in_parallel_attn": (1,)},
        {"num_key_value_heads": _KV_HEADS},
        {"block_form": "parallel"},
    ),
}
