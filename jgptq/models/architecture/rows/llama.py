"""Llama and the families that differ from it by biases, norms, windows and rotary positions."""

from collections.abc import Mapping

from jgptq.models.architecture.row import Family, Key, Window
from jgptq.models.architecture.rows.common import ATTENTION_BIAS, COMMON, LLAMA_NORMS, MLP_BIAS, OUTPUT_NORMS, USE_BIAS

ROWS: Mapping[str, Family] = {
    "llama": Family(
        hf_class="LlamaForCausalLM",
        keys=COMMON | ATTENTION_BIAS | MLP_BIAS,
        modules=LLAMA_NORMS,
    ),
    "mistral": Family(
        hf_class="MistralForCausalLM",
        keys=COMMON | {"num_key_value_heads": Key("num_key_value_heads", 8)},
        max_positions=131072,
        window=Window(default=4096, blocks="all"),
        modules=LLAMA_NORMS,
    ),
    "qwen2": Family(
        hf_class="Qwen2ForCausalLM",
        keys=COMMON | {"num_key_value_heads": Key("num_key_value_heads", 32)},
        fixed={"qkv_bias": True},
        max_positions=32768,
        window=Window(default=4096),
        modules=LLAMA_NORMS,
    ),
    "qwen3": Family(
        hf_class="Qwen3ForCausalLM",
        keys=COMMON | ATTENTION_BIAS | {"num_key_value_heads": Key("num_key_value_heads", 32), "head_dim": Key("head_dim", 128)},
        fixed={"qk_norm": "head"},
        max_positions=32768,
        window=Window(default=4096),
        modules=LLAMA_NORMS,
    ),
    # Multipliers of token vectors, scores, what is added to the stream, and logits.
    "granite": Family(
        hf_class="GraniteForCausalLM",
        keys=COMMON
        | ATTENTION_BIAS
        | MLP_BIAS
        | {
            name: Key(name, 1.0)
            for name in ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
        },
        modules=LLAMA_NORMS,
    ),
    # Every fourth block has no rotary positions.
    "smollm3": Family(
        hf_class="SmolLM3ForCausalLM",
        keys=COMMON
        | ATTENTION_BIAS
        | MLP_BIAS
        | {"num_key_value_heads": Key("num_key_value_heads", 4), "tie_word_embeddings": Key("tie_word_embeddings", True)},
        max_positions=32768,
        rotary_defaults={"rope_theta": 2e6},
        rotated="listed",
        window=Window(default=None, blocks="unrotated"),
        modules=LLAMA_NORMS,
    ),
    "ministral": Family(
        hf_class="MinistralForCausalLM",
        keys=COMMON | {"num_key_value_heads": Key("num_key_value_heads", 8)},
        max_positions=131072,
        window=Window(default=4096, blocks="patterned"),
        modules=LLAMA_NORMS,
    ),
    "seed_oss": Family(
        hf_class="SeedOssForCausalLM",
        keys=COMMON
        | MLP_BIAS
        | {
            "num_key_value_heads": Key("num_key_value_heads", 8),
            "head_dim": Key("head_dim", 128),
            "qkv_bias": Key("attention_bias", True),
            "o_bias": Key("attention_out_bias", False),
        },
        max_positions=524288,
        modules=LLAMA_NORMS,
    ),
    "arcee": Family(
        hf_class="ArceeForCausalLM",
        keys=COMMON
        | ATTENTION_BIAS
        | MLP_BIAS
        | {"hidden_act": Key("hidden_act", "relu2"), "norm_eps": Key("rms_norm_eps", 1e-5)},
        fixed={"gated_mlp": False},
        max_positions=4096,
        modules=LLAMA_NORMS,
    ),
    "helium": Family(
        hf_class="HeliumForCausalLM",
        keys=COMMON
        | MLP_BIAS
        | {
            "num_key_value_heads": Key("num_key_value_heads", 20),
            "head_dim": Key("head_dim", 128),
            "norm_eps": Key("rms_norm_eps", 1e-8),
            "qkv_bias": Key("attention_bias", False),
        },
        fixed={"rotary_pairs": "neighbours"},
        max_positions=4096,
        rotary_defaults={"rope_theta": 100000.0},
        modules=LLAMA_NORMS,
    ),
    "ernie4_5": Family(
        hf_class="Ernie4_5ForCausalLM",
        keys=COMMON
        | USE_BIAS
        | {
            "num_key_value_heads": Key("num_key_value_heads", 2),
            "head_dim": Key("head_dim", 128),
            "norm_eps": Key("rms_norm_eps", 1e-5),
            "tie_word_embeddings": Key("tie_word_embeddings", True),
        },
        fixed={"rotary_pairs": "neighbours"},
        max_positions=131072,
        rotary_defaults={"rope_theta": 500000.0},
        modules=LLAMA_NORMS,
    ),
    # Blocks without a window have no positions, in models that have windows at all.
    "exaone4": Family(
        hf_class="Exaone4ForCausalLM",
        keys=COMMON | {"num_key_value_heads": Key("num_key_value_heads", 32), "norm_eps": Key("rms_norm_eps", 1e-5)},
        fixed={"block_form": "output", "qk_norm": "head"},
        rotated="sliding_or_all",
        window=Window(default=4096, blocks="patterned", period=4, period_key="sliding_window_pattern"),
        modules=OUTPUT_NORMS,
    ),
}
