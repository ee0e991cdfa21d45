"""Families with layer norms and biases."""

from collections.abc import Mapping

from jgptq.models.architecture.row import Family, Key, Rotation
from jgptq.models.architecture.rows.common import LLAMA_NORMS, SIZES

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
        | {
            "num_key_value_heads": Key("num_key_value_heads", 32),
            "hidden_act": Key("hidden_act", "silu"),
            "norm_eps": Key("layer_norm_eps", 1e-5),
            "block_form": Key("use_parallel_residual", False, {False: "pre", True: "parallel"}),
            "qkv_bias": Key("use_qkv_bias", False),
            "tie_word_embeddings": Key("tie_word_embeddings", False),
        },
        fixed={"norm": "layer", "norm_bias": True},
        max_positions=4096,
        rotation=Rotation(partial=0.25),
        modules=LLAMA_NORMS,
    ),
}
