"""Configs of tiny models with experts, in the form of `twins.ROWS`."""

SIZES = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
BASE = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 0.01, "rope_theta": 500.0}


def _row(model_type: str, **changes) -> dict:
    return {"model_type": model_type, **BASE, **changes}


QWEN = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}

ROWS: dict[str, tuple[dict, dict | None]] = {
    "qwen3_moe": (_row("qwen3_moe", head_dim=16, **QWEN, norm_topk_prob=True), {"norm_topk_prob": False}),
    "qwen3_moe_some_dense": (
        _row("qwen3_moe", head_dim=32, **QWEN, num_hidden_layers=4, decoder_sparse_step=2, mlp_only_layers=[3]),
        {"norm_topk_prob": True},
    ),
    "qwen3_moe_window": (
        _row("qwen3_moe", **QWEN | {"num_experts_per_tok": 5}, attention_bias=True, use_sliding_window=True, sliding_window=5),
        {"use_sliding_window": False},
    ),
    "mixtral": (_row("mixtral", **MIXTRAL), {"num_experts_per_tok": 1}),
    "mixtral_window": (
        _row("mixtral", **MIXTRAL | {"num_local_experts": 5, "num_experts_per_tok": 3}, sliding_window=5, head_dim=32),
        {"sliding_window": None},
    ),
    "mixtral_tied": (_row("mixtral", **MIXTRAL, hidden_act="gelu", tie_word_embeddings=True), {"hidden_act": "silu"}),
    "olmoe": (_row("olmoe", num_experts=8, num_experts_per_tok=3), {"norm_topk_prob": True}),
    "olmoe_attention_bias": (
        _row("olmoe", num_experts=6, num_experts_per_tok=2, attention_bias=True, norm_topk_prob=True, num_key_value_heads=None),
        {"num_experts_per_tok": 1},
    ),
    "qwen2_moe": (_row("qwen2_moe", **QWEN, shared_expert_intermediate_size=96), {"norm_topk_prob": True}),
    "qwen2_moe_some_dense": (
        _row(
            "qwen2_moe",
            **QWEN,
            shared_expert_intermediate_size=64,
            num_hidden_layers=4,
            decoder_sparse_step=2,
            mlp_only_layers=[1],
            qkv_bias=False,
            norm_topk_prob=True,
        ),
        {"norm_topk_prob": False},
    ),
    "qwen2_moe_window": (
        _row(
            "qwen2_moe",
            **QWEN,
            shared_expert_intermediate_size=64,
            num_hidden_layers=3,
            use_sliding_window=True,
            sliding_window=5,
            max_window_layers=2,
        ),
        {"max_window_layers": 0},
    ),
}
