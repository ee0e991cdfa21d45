"""Tiny configs of families whose files hold fused or transposed linears; rows as those of `twins.ROWS`."""

GPT2 = {"vocab_size": 61, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
SIZES = {"vocab_size": 61, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
NEOX = {**SIZES, "model_type": "gpt_neox", "intermediate_size": 96, "max_position_embeddings": 64, "layer_norm_eps": 0.01}
FALCON = {**SIZES, "model_type": "falcon", "max_position_embeddings": 64, "layer_norm_epsilon": 0.01}
GROUPED = {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}
BLOOM = {"model_type": "bloom", "vocab_size": 61, "n_embed": 64, "n_layer": 2, "num_attention_heads": 4}
GATED = {**SIZES, "intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
PHI3 = {**GATED, "model_type": "phi3", "rms_norm_eps": 0.01, "rope_theta": 500.0}
GLM = {**GATED, "head_dim": 16, "rms_norm_eps": 0.01, "rope_theta": 500.0}

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4, "beta_slow": 0.25}
SHORT = {"type": "longrope", "short_factor": [1.0 + i / 8 for i in range(6)], "long_factor": [1.5 + i for i in range(6)]}

# name: (config.json, keys whose change must change the logits: otherwise the row proves nothing)
FUSED: dict[str, tuple[dict, dict | None]] = {
    "gpt2": ({**GPT2, "model_type": "gpt2"}, {"activation_function": "relu"}),
    "gpt2_inner_untied": (
        {**GPT2, "model_type": "gpt2", "n_inner": 96, "tie_word_embeddings": False, "layer_norm_epsilon": 0.01},
        {"layer_norm_epsilon": 1e-5},
    ),
    "gpt_bigcode": ({**GPT2, "model_type": "gpt_bigcode"}, {"activation_function": "relu"}),
    "gpt_bigcode_multi_head": ({**GPT2, "model_type": "gpt_bigcode", "multi_query": False, "n_inner": 96}, None),
    "gpt_neox": ({**NEOX, "rotary_emb_base": 500}, {"rotary_emb_base": 10000}),
    "gpt_neox_one_after_the_other": (
        {**NEOX, "use_parallel_residual": False, "rotary_pct": 0.5, "tie_word_embeddings": True, "hidden_act": "gelu_fast"},
        {"use_parallel_residual": True},
    ),
    "gpt_neox_dynamic": (
        {**NEOX, "rotary_pct": 1.0, "max_position_embeddings": 16, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
        {"rope_scaling": None},
    ),
    "gpt_neox_linear": (
        {**NEOX, "attention_bias": False, "rotary_pct": 1.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rotary_pct": 0.25},
    ),
    "bloom": (BLOOM, None),
    "bloom_six_heads": (
        {"model_type": "bloom", "vocab_size": 61, "hidden_size": 96, "n_layer": 2, "n_head": 6, "tie_word_embeddings": False},
        None,
    ),
    "falcon": (FALCON, {"layer_norm_epsilon": 1e-5}),
    "falcon_one_after_the_other": (
        FALCON | {"parallel_attn": False, "bias": True, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_scaling": None},
    ),
    "falcon_rw": (
        FALCON
        | {"hidden_size": 96, "num_attention_heads": 12, "alibi": True}
        | {"multi_query": False, "parallel_attn": False, "bias": True},
        {"alibi": False},
    ),
    "falcon_multi_head_parallel": (FALCON | {"multi_query": False, "tie_word_embeddings": False}, {"activation": "relu"}),
    "falcon_grouped": (GROUPED | {"ffn_hidden_size": 96}, {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "falcon_grouped_alibi": (GROUPED | {"alibi": True, "num_kv_heads": None, "bias": True}, {"alibi": False}),
    "falcon_grouped_one_norm": (GROUPED | {"num_ln_in_parallel_attn": 1}, None),
    "phi3": (PHI3, {"rope_theta": 10000.0}),
    "phi3_window_tied": (
        PHI3 | {"num_key_value_heads": None, "sliding_window": 5, "tie_word_embeddings": True},
        {"sliding_window": 6},
    ),
    "phi4_longrope_below_original": (
        PHI3 | {"partial_rotary_factor": 0.75, "rope_scaling": SHORT, "original_max_position_embeddings": 32},
        {"original_max_position_embeddings": 16},
    ),
    "phi3_longrope_above_original": (
        PHI3
        | {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 16}
        | {"rope_scaling": SHORT | {"type": "su", "original_max_position_embeddings": 16}},
        {"original_max_position_embeddings": 32},
    ),
    "glm": (GLM | {"model_type": "glm"}, {"rms_norm_eps": 1e-6}),
    "glm_linear_tied": (
        GLM
        | {"model_type": "glm", "tie_word_embeddings": True, "partial_rotary_factor": 1.0, "attention_bias": False}
        | {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"partial_rotary_factor": 0.5},
    ),
    "glm4": (GLM | {"model_type": "glm4"}, {"rope_theta": 10000.0}),
    "glm4_every_head_its_own": (
        GLM | {"model_type": "glm4", "num_key_value_heads": 4, "head_dim": 24, "rope_scaling": YARN},
        {"rope_scaling": None},
    ),
}
