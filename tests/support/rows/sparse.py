"""Configs of tiny models with experts, and what has to show in their logits."""

from rows.common import hf_dict

QWEN = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}

# name: (config.json, keys whose change must change the logits: otherwise the row proves nothing)
SPARSE: dict[str, tuple[dict, dict | None]] = {
    "qwen3_moe": (hf_dict("qwen3_moe", head_dim=16, **QWEN, norm_topk_prob=True), {"norm_topk_prob": False}),
    "qwen3_moe_some_dense": (
        hf_dict("qwen3_moe", head_dim=32, **QWEN, num_hidden_layers=4, decoder_sparse_step=2, mlp_only_layers=[3]),
        {"norm_topk_prob": True},
    ),
    "qwen3_moe_window": (
        hf_dict("qwen3_moe", **QWEN | {"num_experts_per_tok": 5}, attention_bias=True, use_sliding_window=True, sliding_window=5),
        {"use_sliding_window": False},
    ),
    "mixtral": (hf_dict("mixtral", **MIXTRAL), {"num_experts_per_tok": 1}),
    "mixtral_window": (
        hf_dict("mixtral", **MIXTRAL | {"num_local_experts": 5, "num_experts_per_tok": 3}, sliding_window=5, head_dim=32),
        {"sliding_window": None},
    ),
    "mixtral_tied": (hf_dict("mixtral", **MIXTRAL, hidden_act="gelu", tie_word_embeddings=True), {"hidden_act": "silu"}),
    "olmoe": (hf_dict("olmoe", num_experts=8, num_experts_per_tok=3), {"norm_topk_prob": True}),
    "olmoe_attention_bias": (
        hf_dict(
            "olmoe", num_experts=6, num_experts_per_tok=2, attention_bias=True, norm_topk_prob=True, num_key_value_heads=None
        ),
        {"num_experts_per_tok": 1},
    ),
    "qwen2_moe": (hf_dict("qwen2_moe", **QWEN, shared_expert_intermediate_size=96), {"norm_topk_prob": True}),
    "qwen2_moe_some_dense": (
        hf_dict(
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
        hf_dict(
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
    "deepseek_v2": (
        hf_dict("deepseek_v2", **DEEPSEEK, n_shared_experts=2, first_k_dense_replace=1),
        {"routed_scaling_factor": 2.0},
    ),
    "deepseek_v2_groups": (
        hf_dict(
            "deepseek_v2",
            **DEEPSEEK | {"q_lora_rank": None, "v_head_dim": 24},
            n_shared_experts=1,
            first_k_dense_replace=0,
            topk_method="group_limited_greedy",
            n_group=4,
            topk_group=2,
            attention_bias=True,
        ),
        {"topk_method": "greedy"},
    ),
    "deepseek_v3": (
        hf_dict("deepseek_v3", **DEEPSEEK, n_shared_experts=1, first_k_dense_replace=1, n_group=4, topk_group=2),
        {"topk_group": 4},
    ),
    "deepseek_v3_yarn": (
        hf_dict(
            "deepseek_v3",
            **DEEPSEEK | {"q_lora_rank": None},
            n_shared_experts=1,
            first_k_dense_replace=0,
            n_group=1,
            topk_group=1,
            norm_topk_prob=False,
            rope_interleave=False,
            attention_bias=True,
            rope_scaling={
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        ),
        {"rope_interleave": True},
    ),
}
