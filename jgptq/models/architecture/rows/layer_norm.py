"""Families with layer norms and biases."""

from collections.abc import Mapping

from jgptq.models.architecture.row import Family, Key, Window
from jgptq.models.architecture.rows.common import (
    ATTENTION_BIAS,
    COMMON,
    LAYER_NORM_EPS,
    LLAMA_NORMS,
    MLP_BIAS,
    SIZES,
    TANH,
    USE_BIAS,
)

_ONE_NORM = {"norm": "layer", "norm_bias": True, "block_form": "parallel", "gated_mlp": False, "lm_head_bias": True}

ROWS: Mapping[str, Family] = {
    # arXiv 2205.01068. The 350m model norms the stream after each sublayer, and its token vectors are narrower than the stream.
    "opt": Family(
        hf_class="OPTForCausalLM",
        keys=SIZES
        | {
            "intermediate_size": Key("ffn_dim"),
            "hidden_act": Key("activation_function", "relu"),
            "block_form": Key("do_layer_norm_before", True, {True: "pre", False: "post"}),
            "final_norm": Key("_remove_final_layer_norm", False, {False: True, True: False}),
            "embedding_width": Key("word_embed_proj_dim", None),
            "norm_affine": Key("layer_norm_elementwise_affine", True),
            "qkv_bias": Key("enable_bias", True),
            "o_bias": Key("enable_bias", True),
            "mlp_bias": Key("enable_bias", True),
            "tie_word_embeddings": Key("tie_word_embeddings", True),
        },
        fixed={"norm": "layer", "norm_eps": 1e-5, "norm_bias": True, "gated_mlp": False},
        positions="learned",
        position_offset=2,
        decoder="model.decoder",
        modules={
            "attn_norm": "self_attn_layer_norm",
            "mlp_norm": "final_layer_norm",
            "self_attn.o_proj": "self_attn.out_proj",
            "mlp.up_proj": "fc1",
            "mlp.down_proj": "fc2",
            "norm": "final_layer_norm",
        },
    ),
    "stablelm": Family(
        hf_class="StableLmForCausalLM",
        keys=SIZES
        | LAYER_NORM_EPS
        | {
            "num_key_value_heads": Key("num_key_value_heads", 32),
            "hidden_act": Key("hidden_act", "silu"),
            "block_form": Key("use_parallel_residual", False, {False: "pre", True: "parallel"}),
            "qkv_bias": Key("use_qkv_bias", False),
            "tie_word_embeddings": Key("tie_word_embeddings", False),
        },
        fixed={"norm": "layer", "norm_bias": True},
        max_positions=4096,
        partial_rotary=0.25,
        modules=LLAMA_NORMS,
    ),
    # arXiv 2402.19173.
    "starcoder2": Family(
        hf_class="Starcoder2ForCausalLM",
        keys=COMMON
        | {name: Key(key.name, True) for name, key in USE_BIAS.items()}
        | {
            "num_key_value_heads": Key("num_key_value_heads", 2),
            "hidden_act": Key("hidden_act", TANH),
            "norm_eps": Key("norm_epsilon", 1e-5),
            "tie_word_embeddings": Key("tie_word_embeddings", True),
        },
        fixed={"norm": "layer", "norm_bias": True, "gated_mlp": False},
        max_positions=4096,
        window=Window(default=None, blocks="all"),
        modules=LLAMA_NORMS | {"mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"},
    ),
    # arXiv 2309.05463.
    "phi": Family(
        hf_class="PhiForCausalLM",
        keys={name: key for name, key in COMMON.items() if name != "tie_word_embeddings"}
        | LAYER_NORM_EPS
        | {
            "hidden_act": Key("hidden_act", "gelu_new"),
            "qk_norm": Key("qk_layernorm", False, {False: None, True: "head"}),
        },
        fixed=_ONE_NORM | {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
        partial_rotary=0.5,
        modules={
            "attn_norm": "input_layernorm",
            "self_attn.o_proj": "self_attn.dense",
            "self_attn.q_norm": "self_attn.q_layernorm",
            "self_attn.k_norm": "self_attn.k_layernorm",
            "mlp.up_proj": "mlp.fc1",
            "mlp.down_proj": "mlp.fc2",
            "norm": "final_layernorm",
        },
    ),
    # arXiv 2402.16819. Norms store their distance from one.
    "nemotron": Family(
        hf_class="NemotronForCausalLM",
        keys=COMMON | ATTENTION_BIAS | MLP_BIAS | {"hidden_act": Key("hidden_act", "relu2"), "norm_eps": Key("norm_eps", 1e-5)},
        fixed={"norm": "layer", "norm_bias": True, "norm_offset": 1.0, "gated_mlp": False},
        max_positions=4096,
        partial_rotary=0.5,
        modules=LLAMA_NORMS,
    ),
    "jais2": Family(
        hf_class="Jais2ForCausalLM",
        keys=COMMON
        | LAYER_NORM_EPS
        | {
            "hidden_act": Key("hidden_act", "relu2"),
            "qkv_bias": Key("attention_bias", True),
            "o_bias": Key("attention_bias", True),
            "mlp_bias": Key("mlp_bias", True),
        },
        fixed={"norm": "layer", "norm_bias": True, "gated_mlp": False},
        max_positions=8192,
        modules=LLAMA_NORMS,
    ),
    "gptj": Family(
        hf_class="GPTJForCausalLM",
        keys={
            "vocab_size": Key("vocab_size"),
            "hidden_size": Key("n_embd", aliases=("hidden_size",)),
            "intermediate_size": Key("n_inner", None),  # None: 4 * hidden_size
            "num_hidden_layers": Key("n_layer", aliases=("num_hidden_layers",)),
            "num_attention_heads": Key("n_head", aliases=("num_attention_heads",)),
            "hidden_act": Key("activation_function", "gelu_new"),
            "norm_eps": Key("layer_norm_epsilon", 1e-5),
        },
        fixed=_ONE_NORM | {"mlp_bias": True, "rotary_pairs": "neighbours"},
        positions_key="n_positions",
        rotary_dim=Key("rotary_dim", 64),
        decoder="transformer",
        blocks="h",
        buffers=(".attn.bias", ".attn.masked_bias"),
        modules={
            "embed_tokens": "wte",
            "attn_norm": "ln_1",
            "self_attn.q_proj": "attn.q_proj",
            "self_attn.k_proj": "attn.k_proj",
            "self_attn.v_proj": "attn.v_proj",
            "self_attn.o_proj": "attn.out_proj",
            "mlp.up_proj": "mlp.fc_in",
            "mlp.down_proj": "mlp.fc_out",
            "norm": "ln_f",
        },
    ),
}
