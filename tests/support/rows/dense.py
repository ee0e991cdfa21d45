"""Tiny config.json files of dense families, and what has to show in their logits."""

from rows.common import SLIDES, hf_dict

ONE_FULL = {"num_hidden_layers": 3, "layer_types": [*SLIDES, "full_attention"], "sliding_window": 5}
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4, "beta_slow": 0.25}
MULTIPLIERS = {"embedding_multiplier": 3.0, "attention_multiplier": 0.4, "residual_multiplier": 0.6, "logits_scaling": 0.5}
GEMMA3 = {"head_dim": 32, "query_pre_attn_scalar": 24}
WIDE = {"head_dim": 16}
GPTJ = {"model_type": "gptj", "vocab_size": 61, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 10}
STARCODER2 = {"norm_epsilon": 0.01}

# name: (config.json, keys whose change must change the logits: otherwise the row proves nothing)
DENSE: dict[str, tuple[dict, dict | None]] = {
    "gemma3": (hf_dict("gemma3_text", **GEMMA3, **ONE_FULL), {"rope_local_base_freq": 50.0}),
    "gemma3_scaled": (
        hf_dict("gemma3_text", **GEMMA3, **ONE_FULL, rope_scaling=LINEAR, rope_local_base_freq=100.0),
        {"rope_scaling": None},
    ),
    "gemma3_pattern": (
        hf_dict(
            "gemma3_text",
            **GEMMA3,
            sliding_window=7,
            sliding_window_pattern=2,
            final_logit_softcapping=2.0,
            tie_word_embeddings=False,
            attention_bias=True,
            rope_scaling=YARN,
        ),
        {"sliding_window_pattern": 3},
    ),
    "vaultgemma": (
        hf_dict("vaultgemma", **GEMMA3, attn_logit_softcapping=1.5, final_logit_softcapping=2.0, sliding_window=5),
        {"attn_logit_softcapping": None},
    ),
    "granite": (hf_dict("granite", **MULTIPLIERS), {"residual_multiplier": 1.0}),
    "granite_tied": (hf_dict("granite", **MULTIPLIERS, tie_word_embeddings=True, mlp_bias=True), {"logits_scaling": 1.0}),
    "granite_silent": (hf_dict("granite", attention_bias=True, num_key_value_heads=None), {"attention_multiplier": 0.4}),
    "smollm3": (hf_dict("smollm3", num_hidden_layers=4, rope_scaling=YARN), {"no_rope_layers": [1, 1, 1, 1]}),
    "smollm3_listed": (
        hf_dict("smollm3", no_rope_layers=[0, 1, 1], tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
        {"no_rope_layers": [1, 0]},
    ),
    "smollm3_windows": (
        hf_dict("smollm3", no_rope_layer_interval=2, use_sliding_window=True, sliding_window=5),
        {"use_sliding_window": False},
    ),
    "ministral": (hf_dict("ministral", **WIDE, sliding_window=5), {"layer_types": ["full_attention"] * 2}),
    "ministral_mixed": (
        hf_dict(
            "ministral", **WIDE, sliding_window=5, layer_types=["full_attention", "sliding_attention"], tie_word_embeddings=True
        ),
        {"layer_types": None},
    ),
    "exaone4": (hf_dict("exaone4", **ONE_FULL), {"layer_types": SLIDES + SLIDES[:1]}),
    "exaone4_pattern": (
        hf_dict("exaone4", sliding_window=7, sliding_window_pattern=2, tie_word_embeddings=True, rope_scaling=YARN),
        {"rope_scaling": None},
    ),
    "exaone4_full": (
        hf_dict("exaone4", sliding_window=None, layer_types=["full_attention"] * 2),
        {"sliding_window": 64},
    ),
    "seed_oss": (hf_dict("seed_oss", **WIDE), None),
    "seed_oss_every_bias": (hf_dict("seed_oss", head_dim=32, attention_out_bias=True, mlp_bias=True), None),
    "arcee": (hf_dict("arcee"), {"hidden_act": "relu"}),
    "arcee_every_bias": (hf_dict("arcee", attention_bias=True, mlp_bias=True, tie_word_embeddings=True), None),
    "helium": (hf_dict("helium", **WIDE), {"rope_theta": 10000.0}),
    "helium_scaled": (hf_dict("helium", **WIDE, attention_bias=True, mlp_bias=True, rope_scaling=YARN), {"rope_scaling": None}),
    "ernie4_5": (hf_dict("ernie4_5", **WIDE), {"rope_theta": 10000.0}),
    "ernie4_5_every_bias": (hf_dict("ernie4_5", head_dim=32, use_bias=True, tie_word_embeddings=False), None),
    "olmo": (hf_dict("olmo"), {"rope_theta": 10000.0}),
    "olmo_clipped": (hf_dict("olmo", clip_qkv=0.7, attention_bias=True, tie_word_embeddings=True), {"clip_qkv": None}),
    "olmo_clipped_each": (hf_dict("olmo", clip_qkv=0.7, num_key_value_heads=None), {"clip_qkv": 0.8}),
    "olmo3": (hf_dict("olmo3", **ONE_FULL, rope_theta=500000.0, rope_scaling=YARN), {"rope_scaling": None}),
    "olmo3_pattern": (
        hf_dict("olmo3", num_hidden_layers=4, sliding_window=7, rope_theta=500000.0, attention_bias=True),
        {"layer_types": SLIDES * 2},
    ),
    "cohere": (hf_dict("cohere", use_qk_norm=True, logit_scale=2.0), {"logit_scale": 1.0}),
    "cohere_untied": (
        hf_dict("cohere", tie_word_embeddings=False, attention_bias=True, logit_scale=1.0, layer_norm_eps=0.01),
        {"layer_norm_eps": 1e-5},
    ),
    "cohere2": (hf_dict("cohere2", **ONE_FULL, logit_scale=1.0), {"layer_types": SLIDES + SLIDES[:1]}),
    "cohere2_pattern": (
        hf_dict(
            "cohere2",
            logit_scale=1.0,
            sliding_window_pattern=2,
            sliding_window=7,
            tie_word_embeddings=False,
            attention_bias=True,
            rope_scaling=LINEAR,
        ),
        {"rope_scaling": None},
    ),
    "starcoder2": (hf_dict("starcoder2", **STARCODER2), {"norm_epsilon": 1e-5}),
    "starcoder2_window": (
        hf_dict("starcoder2", **STARCODER2, sliding_window=5, use_bias=False, tie_word_embeddings=False, hidden_act="gelu"),
        {"sliding_window": 6},
    ),
    "phi": (hf_dict("phi"), {"partial_rotary_factor": 1.0}),
    "phi_qk_norm": (
        hf_dict("phi", qk_layernorm=True, num_key_value_heads=None, partial_rotary_factor=0.4, rope_scaling=LINEAR),
        {"rope_scaling": None},
    ),
    "gptj": (GPTJ, {"rotary_dim": 8}),
    "gptj_inner": (GPTJ | {"n_inner": 96, "rotary_dim": 16, "layer_norm_epsilon": 0.01}, {"layer_norm_epsilon": 1e-5}),
    "nemotron": (hf_dict("nemotron", norm_eps=0.01), {"norm_eps": 1e-5}),
    "nemotron_every_bias": (
        hf_dict("nemotron", head_dim=32, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, partial_rotary_factor=1.0),
        {"partial_rotary_factor": 0.5},
    ),
    "jais2": (hf_dict("jais2", layer_norm_eps=0.01), {"layer_norm_eps": 1e-5}),
    "jais2_bare": (hf_dict("jais2", attention_bias=False, mlp_bias=False, tie_word_embeddings=True, head_dim=32), None),
}
