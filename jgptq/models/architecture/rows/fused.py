"""Families with layer norms and biases whose files hold queries, keys and values as one linear."""

from collections.abc import Mapping
from typing import Any

from jgptq.models.architecture.row import Family, Key
from jgptq.models.architecture.rows.common import LLAMA_NORMS, SIZES, TANH

LAYER_NORM: Mapping[str, Any] = {"norm": "layer", "norm_bias": True, "gated_mlp": False}
BIASES: Mapping[str, Any] = {"qkv_bias": True, "o_bias": True, "mlp_bias": True}
DENSE = {
    "self_attn.o_proj": "self_attention.dense",
    "mlp.up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}

_GPT2_KEYS = {
    "vocab_size": Key("vocab_size"),
    "hidden_size": Key("n_embd", aliases=("hidden_size",)),
    "intermediate_size": Key("n_inner", None),  # None: 4 * hidden_size
    "num_hidden_layers": Key("n_layer", aliases=("num_hidden_layers",)),
    "num_attention_heads": Key("n_head", aliases=("num_attention_heads",)),
    "norm_eps": Key("layer_norm_epsilon", 1e-5),
    "tie_word_embeddings": Key("tie_word_embeddings", True),
}
_GPT2_MODULES = {
    "embed_tokens": "wte",
    "embed_positions": "wpe",
    "norm": "ln_f",
    "attn_norm": "ln_1",
    "mlp_norm": "ln_2",
    "self_attn.qkv_proj": "attn.c_attn",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}


def _bigcode(multi_query: tuple[Any, ...], **fixed: Any) -> Family:
    """GPT-2 with linears in Torch's layout, and one key-value head or as many as query heads (arXiv 2301.03988)."""
    return Family(
        hf_class="GPTBigCodeForCausalLM",
        model_type="gpt_bigcode",
        where={"multi_query": multi_query},
        keys=_GPT2_KEYS | {"hidden_act": Key("activation_function", TANH)},
        fixed={**LAYER_NORM, **BIASES, **fixed},
        positions="learned",
        positions_key="n_positions",
        max_positions=1024,
        decoder="transformer",
        blocks="h",
        buffers=(".attn.bias", ".attn.masked_bias"),
        modules=_GPT2_MODULES,
    )


ROWS: Mapping[str, Family] = {
    "gpt2": Family(
        hf_class="GPT2LMHeadModel",
        keys=_GPT2_KEYS | {"hidden_act": Key("activation_function", "gelu_new")},
        fixed={**LAYER_NORM, **BIASES, "qkv_layout": "stacked"},
        positions="learned",
        positions_key="n_positions",
        max_positions=1024,
        decoder="transformer",
        blocks="h",
        conv1d=True,
        buffers=(".attn.bias", ".attn.masked_bias"),
        modules=_GPT2_MODULES,
    ),
    "gpt_bigcode": _bigcode((True, None), qkv_layout="stacked", num_key_value_heads=1),
    "gpt_bigcode_multi_head": _bigcode((False,), qkv_layout="grouped"),
    # arXiv 2204.06745; Pythia, arXiv 2304.01373.
    "gpt_neox": Family(
        hf_class="GPTNeoXForCausalLM",
        keys=SIZES
        | {
            "hidden_act": Key("hidden_act", "gelu"),
            "norm_eps": Key("layer_norm_eps", 1e-5),
            "block_form": Key("use_parallel_residual", True, {False: "pre", True: "parallel_two_norms"}),
            "qkv_bias": Key("attention_bias", True),
            "o_bias": Key("attention_bias", True),
            "tie_word_embeddings": Key("tie_word_embeddings", False),
        },
        fixed={**LAYER_NORM, "mlp_bias": True, "qkv_layout": "grouped"},
        partial_rotary=0.25,
        rotary_keys={"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"},
        decoder="gpt_neox",
        head="embed_out",
        buffers=(".attention.bias", ".attention.masked_bias"),
        modules=LLAMA_NORMS
        | DENSE
        | {
            "embed_tokens": "embed_in",
            "norm": "final_layer_norm",
            "self_attn.qkv_proj": "attention.query_key_value",
            "self_attn.o_proj": "attention.dense",
        },
    ),
    # arXiv 2211.05100.
    "bloom": Family(
        hf_class="BloomForCausalLM",
        keys={
            "vocab_size": Key("vocab_size"),
            "hidden_size": Key("hidden_size", aliases=("n_embed",)),
            "num_hidden_layers": Key("n_layer", aliases=("num_hidden_layers",)),
            "num_attention_heads": Key("n_head", aliases=("num_attention_heads",)),
            "norm_eps": Key("layer_norm_epsilon", 1e-5),
            "tie_word_embeddings": Key("tie_word_embeddings", True),
        },
        fixed={**LAYER_NORM, **BIASES, "hidden_act": TANH, "qkv_layout": "grouped", "embedding_norm": True},
        positions="alibi",
        positions_key="seq_length",
        decoder="transformer",
        blocks="h",
        modules=LLAMA_NORMS
        | DENSE
        | {
            "embed_tokens": "word_embeddings",
            "embed_norm": "word_embeddings_layernorm",
            "norm": "ln_f",
            "self_attn.qkv_proj": "self_attention.query_key_value",
        },
    ),
}
