"""Families with RMS norms whose files hold gate and up as one linear."""

from collections.abc import Mapping

from jgptq.models.architecture.row import Family, Key, Window
from jgptq.models.architecture.rows.common import COMMON, LLAMA_NORMS

_GLM_KEYS = COMMON | {
    "num_key_value_heads": Key("num_key_value_heads", 2),
    "head_dim": Key("head_dim", 128),
    "norm_eps": Key("rms_norm_eps", 1.5625e-7),
    "qkv_bias": Key("attention_bias", True),
}
_GLM_FIXED = {"gate_up_fused": True, "rotary_pairs": "neighbours"}

ROWS: Mapping[str, Family] = {
    # arXiv 2404.14219. Phi-4 is of this architecture too.
    "phi3": Family(
        hf_class="Phi3ForCausalLM",
        keys=COMMON | {"norm_eps": Key("rms_norm_eps", 1e-5)},
        fixed={"qkv_layout": "stacked", "gate_up_fused": True},
        max_positions=4096,
        partial_rotary=1.0,
        rotary_defaults={"original_max_position_embeddings": 4096},
        rope_types={"su": "longrope", "yarn": "longrope"},  # the names in the first files
        window=Window(default=None, blocks="all"),
        modules=LLAMA_NORMS,
    ),
    # arXiv 2406.12793.
    "glm": Family(
        hf_class="GlmForCausalLM",
        keys=_GLM_KEYS,
        fixed=_GLM_FIXED,
        max_positions=131072,
        partial_rotary=0.5,
        modules=LLAMA_NORMS,
    ),
    "glm4": Family(
        hf_class="Glm4ForCausalLM",
        keys=_GLM_KEYS,
        fixed=_GLM_FIXED | {"block_form": "sandwich"},
        max_positions=131072,
        partial_rotary=0.5,
        modules={
            "attn_norm": "input_layernorm",
            "attn_out_norm": "post_self_attn_layernorm",
            "mlp_norm": "post_attention_layernorm",
            "mlp_out_norm": "post_mlp_layernorm",
        },
    ),
}
