"""Llama and the families that differ from it by biases, norms and windows."""

from collections.abc import Mapping

from jgptq.models.architecture.row import Family, Key, Window
from jgptq.models.architecture.rows.common import ATTENTION_BIAS, COMMON, LLAMA_NORMS

ROWS: Mapping[str, Family] = {
    "llama": Family(
        hf_class="LlamaForCausalLM",
        keys=COMMON | ATTENTION_BIAS | {"mlp_bias": Key("mlp_bias", False)},
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
    "olmo2": Family(
        hf_class="Olmo2ForCausalLM",
        keys=COMMON | ATTENTION_BIAS | {"norm_eps": Key("rms_norm_eps", 1e-5)},
        fixed={"block_form": "output", "qk_norm": "width"},
        modules={"attn_norm": "post_attention_layernorm", "mlp_norm": "post_feedforward_layernorm"},
    ),
}
