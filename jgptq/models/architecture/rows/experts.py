"""Families whose MLPs are mixtures of experts."""

from collections.abc import Mapping

from jgptq.models.architecture.row import Family, Key, Mixture, Window
from jgptq.models.architecture.rows.common import ATTENTION_BIAS, COMMON, LLAMA_NORMS, MLP_BIAS

NORMALIZED = {"normalized": Key("norm_topk_prob", False)}
ROUTER = {"mlp.router": "mlp.gate"}
LATENT = {
    "query_rank": Key("q_lora_rank", 1536),
    "kv_rank": Key("kv_lora_rank", 512),
    "plain": Key("qk_nope_head_dim", 128),
    "value": Key("v_head_dim", 128),
}
SHARED_EXPERTS = {f"mlp.shared_expert.{name}_proj": f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")}

ROWS: Mapping[str, Family] = {
    "qwen3_moe": Family(
        hf_class="Qwen3MoeForCausalLM",
        keys=COMMON | ATTENTION_BIAS | {"num_key_value_heads": Key("num_key_value_heads", 4)},
        fixed={"qk_norm": "head"},
        max_positions=32768,
        experts=Mixture(
            keys=NORMALIZED
            | {
                "num_experts": Key("num_experts", 128, aliases=("num_local_experts",)),
                "experts_per_token": Key("num_experts_per_tok", 8),
                "width": Key("moe_intermediate_size", 768),
            },
            blocks="stepped",
        ),
        window=Window(default=4096, blocks="opt_in_all"),
        modules=LLAMA_NORMS | ROUTER,
    ),
    # arXiv 2401.04088. Files call the three linears of an expert w1, w3 and w2.
    "mixtral": Family(
        hf_class="MixtralForCausalLM",
        keys=COMMON | {"num_key_value_heads": Key("num_key_value_heads", 8), "norm_eps": Key("rms_norm_eps", 1e-5)},
        max_positions=131072,
        rotary_defaults={"rope_theta": 1e6},
        experts=Mixture(
            keys={
                "num_experts": Key("num_local_experts", 8),
                "experts_per_token": Key("num_experts_per_tok", 2),
                "width": Key("intermediate_size"),
            },
            fixed={"normalized": True},
        ),
        window=Window(default=None, blocks="all"),
        modules=LLAMA_NORMS
        | {
            "mlp.router": "block_sparse_moe.gate",
            "mlp.experts": "block_sparse_moe.experts",
            "mlp.experts.*.gate_proj": "block_sparse_moe.experts.*.w1",
            "mlp.experts.*.up_proj": "block_sparse_moe.experts.*.w3",
            "mlp.experts.*.down_proj": "block_sparse_moe.experts.*.w2",
        },
    ),
    # arXiv 2409.02060.
    "olmoe": Family(
        hf_class="OlmoeForCausalLM",
        keys=COMMON | ATTENTION_BIAS | {"norm_eps": Key("rms_norm_eps", 1e-5)},
        fixed={"qk_norm": "width"},
        max_positions=4096,
        experts=Mixture(
            keys={
                "num_experts": Key("num_experts", 64),
                "experts_per_token": Key("num_experts_per_tok", 8),
                "width": Key("intermediate_size"),
                "normalized": Key("norm_topk_prob", False),
            },
        ),
        modules=LLAMA_NORMS | ROUTER,
    ),
    "qwen2_moe": Family(
        hf_class="Qwen2MoeForCausalLM",
        keys=COMMON | {"num_key_value_heads": Key("num_key_value_heads", 16), "qkv_bias": Key("qkv_bias", True)},
        max_positions=32768,
        experts=Mixture(
            keys=NORMALIZED
            | {
                "num_experts": Key("num_experts", 60),
                "experts_per_token": Key("num_experts_per_tok", 4),
                "width": Key("moe_intermediate_size", 1408),
                "shared_width": Key("shared_expert_intermediate_size", 5632),
            },
            fixed={"shared_gate": True},
            blocks="stepped",
        ),
        window=Window(default=4096, blocks="opt_in_even"),
        modules=LLAMA_NORMS | ROUTER,
    ),
    # arXiv 2405.04434.
    "deepseek_v2": Family(
        hf_class="DeepseekV2ForCausalLM",
        keys=COMMON | ATTENTION_BIAS | MLP_BIAS | {"head_dim": Key("qk_rope_head_dim", 64)},
        fixed={"rotary_pairs": "neighbours"},
        experts=Mixture(
            keys={
                "num_experts": Key("n_routed_experts", 64),
                "experts_per_token": Key("num_experts_per_tok"),
                "width": Key("moe_intermediate_size", 1407),
                "shared_experts": Key("n_shared_experts", 2),
                "groups": Key("n_group", 1),
                "kept_groups": Key("topk_group", 1),
                "weight_scale": Key("routed_scaling_factor", 1.0),
                "grouped": Key("topk_method", "greedy", {"greedy": False, "group_limited_greedy": True}),
            },
            blocks="after_first",
        ),
        latent=LATENT,
        modules=LLAMA_NORMS | ROUTER | SHARED_EXPERTS,
    ),
    # arXiv 2412.19437.
    "deepseek_v3": Family(
        hf_class="DeepseekV3ForCausalLM",
        keys=COMMON
        | ATTENTION_BIAS
        | {
            "head_dim": Key("qk_rope_head_dim", 64),
            "rotary_pairs": Key("rope_interleave", True, {True: "neighbours", False: "halves"}),
        },
        max_positions=4096,
        experts=Mixture(
            keys={
                "num_experts": Key("n_routed_experts", 256),
                "experts_per_token": Key("num_experts_per_tok", 8),
                "width": Key("moe_intermediate_size", 2048),
                "shared_experts": Key("n_shared_experts", 1),
                "groups": Key("n_group", 8),
                "kept_groups": Key("topk_group", 4),
                "weight_scale": Key("routed_scaling_factor", 2.5),
                "normalized": Key("norm_topk_prob", True),
            },
            first_dense=3,
            fixed={"score": "sigmoid", "corrected": True, "group_best": 2},
            blocks="after_first",
        ),
        latent=LATENT,
        modules=LLAMA_NORMS | ROUTER | SHARED_EXPERTS,
    ),
}
