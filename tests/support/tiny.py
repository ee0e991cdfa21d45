"""A tiny random decoder, and the folder it makes: what tests of the driver and the converters run on."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from converters import save_hf
from converters.checkpoint import SINGLE
from jgptq.models import FAMILIES, AlibiPositions, Decoder, LatentConfig, LearnedPositions, ModelConfig, RopeConfig

VOCAB, SEQ_LEN = 96, 16


OPT: dict[str, Any] = {
    "model_type": "opt",
    "norm": "layer",
    "norm_eps": 1e-5,
    "norm_bias": True,
    "gated_mlp": False,
    "hidden_act": "relu",
    "positions": LearnedPositions(max_position_embeddings=32, offset=2),
    "tie_word_embeddings": True,
    "num_key_value_heads": 4,
    "qkv_bias": True,
    "o_bias": True,
    "mlp_bias": True,
}
"""What makes an OPT of a tiny decoder, norms before the sublayers."""
OPT_350M = OPT | {"block_form": "post", "embedding_width": 32}
"""Norms after them, and token vectors narrower than the residual stream."""
GEMMA2 = {
    "model_type": "gemma2",
    "block_form": "sandwich",
    "norm_offset": 1.0,
    "embedding_scaled": True,
    "hidden_act": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 24,
    "attn_logit_softcapping": 1.0,
    "final_logit_softcapping": 2.0,
    "tie_word_embeddings": True,
    "layer_windows": (8, None),
}
"""What makes a Gemma 2 of a tiny decoder: four norms a block, bounded scores and logits, a window in every other block."""
LATENT = {
    "model_type": "deepseek_v3",
    "latent": LatentConfig(query_rank=32, kv_rank=32, plain=16, value=16),
    "rotary_pairs": "neighbours",
    "num_key_value_heads": 4,
    "head_dim": 32,
}
"""What makes latent attention of that of a tiny decoder."""


COHERE = {
    "model_type": "cohere",
    "norm": "layer",
    "block_form": "parallel",
    "rotary_pairs": "neighbours",
    "positions": RopeConfig(rope_theta=500000.0, max_position_embeddings=8192),
    "qk_norm": "heads",
    "logit_scale": 2.0,
    "tie_word_embeddings": True,
}
"""A Cohere: one norm without bias for attention and MLP, a norm of each head of queries and keys, rotated neighbours."""
GEMMA3 = GEMMA2 | {
    "model_type": "gemma3_text",
    "qk_norm": "head",
    "attn_logit_softcapping": None,
    "layer_ropes": (RopeConfig(rope_theta=100.0), RopeConfig()),
}
"""A Gemma 3: a base wavelength of their own in blocks with a window, norms of queries and keys."""
GRANITE = {
    "model_type": "granite",
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.4,
    "residual_multiplier": 0.5,
    "logits_scaling": 0.5,
}
"""A Granite: multipliers of token vectors, scores, what is added to the stream, and logits."""
PHI = {
    "model_type": "phi",
    "norm": "layer",
    "norm_bias": True,
    "block_form": "parallel",
    "gated_mlp": False,
    "hidden_act": "gelu_new",
    "positions": RopeConfig(partial_rotary_factor=0.5),
    "qkv_bias": True,
    "o_bias": True,
    "mlp_bias": True,
    "lm_head_bias": True,
}
"""A Phi-2: parallel without a gate, partial rotation, biases everywhere."""
GPTJ = PHI | {
    "model_type": "gptj",
    "num_key_value_heads": 4,
    "rotary_pairs": "neighbours",
    "qkv_bias": False,
    "o_bias": False,
}
"""A GPT-J: blocks that lie elsewhere in its files."""
OLMO = {
    "model_type": "olmo",
    "norm": "layer",
    "norm_affine": False,
    "norm_eps": 1e-5,
    "clip_qkv": 0.8,
}
"""An OLMo 1: norms without weights, clipped queries, keys and values."""
SMOLLM3 = {"model_type": "smollm3", "layer_ropes": (RopeConfig(), None), "tie_word_embeddings": True}
"""A SmolLM3: a block without positions."""
NEMOTRON = {
    "model_type": "nemotron",
    "norm": "layer",
    "norm_bias": True,
    "norm_offset": 1.0,
    "gated_mlp": False,
    "hidden_act": "relu2",
    "positions": RopeConfig(partial_rotary_factor=0.5),
}
"""A Nemotron: layer norms that store their distance from one, squared ReLU."""


def _of(model_type: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": model_type, **FAMILIES[model_type].fixed, **changes}


GPT2 = _of(
    "gpt2",
    num_key_value_heads=4,
    hidden_act="gelu_new",
    positions=LearnedPositions(max_position_embeddings=32),
    tie_word_embeddings=True,
)
"""What makes a GPT-2 of a tiny decoder: one linear for queries, keys and values, and kernels that files do not transpose."""
NEOX = _of(
    "gpt_neox",
    num_key_value_heads=4,
    hidden_act="gelu",
    block_form="parallel_two_norms",
    positions=RopeConfig(partial_rotary_factor=0.25),
    qkv_bias=True,
    o_bias=True,
)
"""A GPT-NeoX: two norms of the same stream, and an output projection of its own name."""
BLOOM = _of(
    "bloom",
    num_key_value_heads=4,
    intermediate_size=256,
    positions=AlibiPositions(max_position_embeddings=2048),
    tie_word_embeddings=True,
)
"""A BLOOM: ALiBi, and a norm of the token vectors."""
FALCON = _of("falcon_grouped", hidden_act="gelu", tie_word_embeddings=True)
"""A Falcon whose heads share keys and values in groups."""
PHI3 = _of("phi3")
"""A Phi-3: one linear for queries, keys and values, and one for gate and up."""
GLM4 = _of("glm4", qkv_bias=True, positions=RopeConfig(partial_rotary_factor=0.5))
"""A GLM-4: one linear for gate and up, rotated neighbours, four norms a block."""


def config(**changes: Any) -> ModelConfig:
    base: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "layer_windows": (None, None),
    }
    return ModelConfig(**base | changes)


def decoder(seed: int = 0, dtype: Any = jnp.float16, **changes: Any) -> Decoder:
    """Kernels large enough that every layer moves the logits, norms and biases that are not neutral."""
    model = Decoder(config(**changes), rngs=nnx.Rngs(seed))
    leaves, tree = jax.tree.flatten(model)
    random = np.random.default_rng(seed)

    def draw(leaf: jax.Array) -> jax.Array:
        spread, centre = (0.15, 0.0) if leaf.ndim > 1 else (0.1, 1.0)
        return jnp.asarray(random.normal(size=leaf.shape) * spread + centre, dtype)

    return jax.tree.unflatten(tree, [draw(leaf) for leaf in leaves])


def folder(path: Path, **changes: Any) -> Path:
    return save_hf(decoder(**changes), path, format="float")


def part_gate_and_up(path: Path) -> None:
    """Replaces each packed gate_up_proj of a GPTQ folder by gate_proj and up_proj, as GPTQModel names and asks for them."""
    tensors = safetensors.numpy.load_file(path / SINGLE)
    for name in [name for name in tensors if ".gate_up_proj." in name]:
        tensor = tensors.pop(name)
        halves = (tensor, tensor) if name.endswith("g_idx") else np.split(tensor, 2, axis=-1)
        for part, half in zip(("gate_proj", "up_proj"), halves, strict=True):
            tensors[name.replace("gate_up_proj", part)] = np.array(half)  # safetensors writes a view as if it were whole
    safetensors.numpy.save_file(tensors, path / SINGLE, metadata={"format": "pt"})


def tokens(samples: int = 24, length: int = SEQ_LEN, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (samples, length)).astype(np.int32)


def assert_same(left, right) -> None:
    """Checks that two trees hold the same leaves."""
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
