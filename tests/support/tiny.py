"""A tiny random decoder, and the folder it makes: what tests of the driver and the converters run on."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from converters import save_hf
from jgptq.models import Decoder, LatentConfig, LearnedPositions, ModelConfig

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
    "num_key_value_heads": 4,
    "head_dim": 32,
}
"""What makes latent attention of that of a tiny decoder."""


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


def tokens(samples: int = 24, length: int = SEQ_LEN, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (samples, length)).astype(np.int32)


def assert_same(left, right) -> None:
    """Checks that two trees hold the same leaves."""
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
