"""Keys and names that many families share."""

from jgptq.models.architecture.row import Key

SIZES = {
    name: Key(name) for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
}
COMMON = SIZES | {
    "num_key_value_heads": Key("num_key_value_heads", None),  # None: as many as query heads
    "head_dim": Key("head_dim", None),  # None: hidden_size / num_attention_heads
    "hidden_act": Key("hidden_act", "silu"),
    "norm_eps": Key("rms_norm_eps", 1e-6),
    "tie_word_embeddings": Key("tie_word_embeddings", False),
}
LAYER_NORM_EPS = {"norm_eps": Key("layer_norm_eps", 1e-5)}
USE_BIAS = {name: Key("use_bias", False) for name in ("qkv_bias", "o_bias", "mlp_bias")}
MLP_BIAS = {"mlp_bias": Key("mlp_bias", False)}
ATTENTION_BIAS = {"qkv_bias": Key("attention_bias", False), "o_bias": Key("attention_bias", False)}
TANH = "gelu_pytorch_tanh"
OUTPUT_NORMS = {"attn_norm": "post_attention_layernorm", "mlp_norm": "post_feedforward_layernorm"}
LLAMA_NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
