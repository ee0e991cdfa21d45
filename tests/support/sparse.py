"""Tiny decoders with experts, and what their experts read, by hand."""

from typing import Any

import numpy as np
import tiny

from jgptq.models import ExpertsConfig

EXPERTS = ExpertsConfig(num_experts=4, experts_per_token=2, width=64, sparse_layers=(True, True), normalized=True)
QWEN3_MOE: dict[str, Any] = {"model_type": "qwen3_moe", "qk_norm": "head", "experts": EXPERTS}
MIXTRAL: dict[str, Any] = {"model_type": "mixtral", "intermediate_size": 64, "experts": EXPERTS}
OLMOE: dict[str, Any] = {"model_type": "olmoe", "intermediate_size": 64, "qk_norm": "width", "experts": EXPERTS}
QWEN2_MOE: dict[str, Any] = {
    "model_type": "qwen2_moe",
    "qkv_bias": True,
    "experts": ExpertsConfig(
        num_experts=4, experts_per_token=2, width=32, sparse_layers=(False, True), shared_width=64, shared_gate=True
    ),
}
DEEPSEEK: dict[str, Any] = tiny.LATENT | {
    "experts": ExpertsConfig(
        num_experts=4,
        experts_per_token=2,
        width=32,
        sparse_layers=(False, True),
        score="sigmoid",
        normalized=True,
        weight_scale=2.5,
        groups=2,
        kept_groups=1,
        group_best=2,
        corrected=True,
        shared_width=64,
    )
}
FORMS = {"qwen3_moe": QWEN3_MOE, "mixtral": MIXTRAL, "olmoe": OLMOE, "qwen2_moe": QWEN2_MOE, "deepseek": DEEPSEEK}


def chosen_experts(h_td: np.ndarray, router_de: np.ndarray, count: int) -> np.ndarray:
    """The experts of each token `[T, k]`: those with the largest logits."""
    return np.argsort(-(h_td.astype(np.float64) @ router_de.astype(np.float64)), axis=1, kind="stable")[:, :count]


def textbook_mixture(h_td: np.ndarray, kernels: dict[str, np.ndarray], config: ExpertsConfig) -> np.ndarray:
    """A mixture of gated experts with softmax scores, one token after the other, in float64.

    Args:
      h_td: activations.
      kernels: `router` [D, E], and `gate`, `up`, `down` [E, K, N].
      config: how many experts a token goes to, and whether their weights are normalized.
    """
    wide = {name: kernel.astype(np.float64) for name, kernel in kernels.items()}
    out = np.zeros(h_td.shape)
    for token, h in enumerate(h_td.astype(np.float64)):
        logits = h @ wide["router"]
        scores = np.exp(logits - logits.max())
        scores /= scores.sum()
        best = np.argsort(-scores, kind="stable")[: config.experts_per_token]
        weights = scores[best] / (scores[best].sum() if config.normalized else 1) * config.weight_scale
        for expert, weight in zip(best, weights, strict=True):
            gate, up = h @ wide["gate"][expert], h @ wide["up"][expert]
            out[token] += weight * ((gate / (1 + np.exp(-gate)) * up) @ wide["down"][expert])
    return out
