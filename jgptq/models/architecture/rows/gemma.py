"""The Gemma families: norms that store their distance from one, scaled token vectors, bounded scores."""

from collections.abc import Mapping

from jgptq.models.architecture.row import Family, Key, Window
from jgptq.models.architecture.rows.common import ATTENTION_BIAS, COMMON, LLAMA_NORMS, TANH

_FOUR_NORMS = {
    "attn_norm": "input_layernorm",
    "attn_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}
_SECOND = (
    COMMON
    | ATTENTION_BIAS
    | {
        "num_key_value_heads": Key("num_key_value_heads", 4),
        "head_dim": Key("head_dim", 256),
        "hidden_act": Key("hidden_activation", TANH),
        "query_pre_attn_scalar": Key("query_pre_attn_scalar", 256),
        "tie_word_embeddings": Key("tie_word_embeddings", True),
    }
)
_BOUNDS = {
    "attn_logit_softcapping": Key("attn_logit_softcapping", 50.0),
    "final_logit_softcapping": Key("final_logit_softcapping", 30.0),
}

ROWS: Mapping[str, Family] = {
    "gemma": Family(
        hf_class="GemmaForCausalLM",
        keys=COMMON
        | ATTENTION_BIAS
        | {
            "num_key_value_heads": Key("num_key_value_heads", 16),
            "head_dim": Key("head_dim", 256),
            # The first files say "gelu" and mean its approximation.
            "hidden_act": Key("hidden_act", TANH, {"gelu": TANH, TANH: TANH}),
            "tie_word_embeddings": Key("tie_word_embeddings", True),
        },
        fixed={"norm_offset": 1.0, "embedding_scaled": True},
        max_positions=8192,
        modules=LLAMA_NORMS,
    ),
    # arXiv 2408.00118.
    "gemma2": Family(
        hf_class="Gemma2ForCausalLM",
        keys=_SECOND | _BOUNDS,
        fixed={"block_form": "sandwich", "norm_offset": 1.0, "embedding_scaled": True},
        max_positions=8192,
        window=Window(default=4096, blocks="patterned", period=2),
        modules=_FOUR_NORMS,
    ),
    # arXiv 2503.19786. Blocks with a window have a base wavelength of their own, and are not scaled.
    "gemma3_text": Family(
        hf_class="Gemma3ForCausalLM",
        keys=_SECOND | {"final_logit_softcapping": Key("final_logit_softcapping", None)},
        fixed={"block_form": "sandwich", "norm_offset": 1.0, "embedding_scaled": True, "qk_norm": "head"},
        max_positions=131072,
        rotary_defaults={"rope_theta": 1e6},
        rotated="sliding",
        local_theta=Key("rope_local_base_freq", 10000.0),
        window=Window(default=4096, blocks="patterned", period=6, period_key="sliding_window_pattern"),
        modules=_FOUR_NORMS,
    ),
    # Gemma 2 without the norms on outputs.
    "vaultgemma": Family(
        hf_class="VaultGemmaForCausalLM",
        keys=_SECOND | _BOUNDS,
        fixed={"norm_offset": 1.0, "embedding_scaled": True},
        max_positions=8192,
        window=Window(default=4096, blocks="patterned", period=2),
        modules={"attn_norm": "input_layernorm", "mlp_norm": "pre_feedforward_layernorm"},
    ),
}
