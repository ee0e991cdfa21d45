"""Tiny decoders with experts, and what their experts read, by hand."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import tiny

from jgptq.models import RESIDUAL, Block, Decoder, ExpertsConfig
from jgptq.models.mixture.leaves import PackedExperts
from jgptq.settings.run import QuantizeConfig
from jgptq.solver import solve

OPENING = ("mlp.experts.gate_proj", "mlp.experts.up_proj")

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


def kernels(block: Block, path: str) -> np.ndarray:
    """The float32 kernels `[E, K, N]` of a stack."""
    kernel = block.linears()[path].kernel.get_value()
    return np.asarray(kernel.dequantize() if isinstance(kernel, PackedExperts) else kernel, np.float32)


def expert_inputs(
    params: Decoder, quantized: Decoder, calib: np.ndarray, index: int, everyone: bool
) -> dict[str, list[np.ndarray]]:
    """What the linears of each expert of a block read, `[T, K]`, by hand: the blocks before it are quantized, and so is all of
    the block that comes before. With `everyone`, as if all tokens were routed to each."""
    residual = params.embed(jnp.asarray(calib))
    for block in list(quantized.layers)[:index]:
        residual = block(residual)
    block = quantized.layers[index]
    carry = {RESIDUAL: residual}
    for stage in block.stages():
        if stage.routing is not None:
            break
        carry = block.run(stage, carry)
    h_td = np.asarray(block.mlp_norm(carry[RESIDUAL]), np.float32).reshape(-1, 64)
    chosen_tk = chosen_experts(h_td, np.asarray(block.mlp.router.kernel.get_value()), params.config.experts.experts_per_token)
    gate, up = (kernels(block, path) for path in OPENING)
    read: dict[str, list[np.ndarray]] = {"open": [], "close": []}
    for expert in range(params.config.experts.num_experts):
        mine_tk = h_td if everyone else h_td[(chosen_tk == expert).any(axis=1)]
        opened = mine_tk @ gate[expert]
        read["open"].append(mine_tk)
        read["close"].append(opened / (1 + np.exp(-opened)) * (mine_tk @ up[expert]))
    return read


def hessian_of(h_tk: np.ndarray) -> np.ndarray:
    return 2 / max(len(h_tk), 1) * h_tk.T.astype(np.float64) @ h_tk.astype(np.float64)


def share_of_other_codes(
    params: Decoder, quantized: Decoder, index: int, path: str, hessians: list[np.ndarray], config: QuantizeConfig
) -> list[float]:
    """How many weights of each expert differ from those that the ordinary solver finds on a Hessian."""
    solved = kernels(quantized.layers[index], path)
    original = kernels(params.layers[index], path)
    parts = []
    for expert, h_kk in enumerate(hessians):
        expected = solve(jnp.asarray(original[expert]), jnp.asarray(h_kk, jnp.float32), config).dequantize()
        parts.append(float(np.mean(np.abs(solved[expert] - np.asarray(expected)) > 1e-5)))
    return parts
