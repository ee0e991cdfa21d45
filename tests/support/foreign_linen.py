"""A decoder in Flax's Linen, written as users write them: `nn.scan` over rematerialized layers, `DenseGeneral` heads."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

VOCAB, WIDTH, INNER, LAYERS, HEADS = 80, 64, 96, 2, 4


class Layer(nn.Module):
    @nn.compact
    def __call__(self, h: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        x = nn.LayerNorm()(h)
        split = [nn.DenseGeneral((HEADS, WIDTH // HEADS), name=name)(x) for name in ("query", "key", "value")]
        mixed = nn.dot_product_attention(*split, mask=mask)
        h = h + nn.DenseGeneral(WIDTH, axis=(-2, -1), name="out")(mixed)
        x = nn.RMSNorm()(h)
        return h + nn.Dense(WIDTH, name="down")(nn.gelu(nn.Dense(INNER, name="up")(x))), None


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(VOCAB, WIDTH, name="embed")
        h = embed(tokens)
        scanned = nn.scan(
            nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=LAYERS
        )
        h, _ = scanned(name="layers")(h, nn.make_causal_mask(tokens, dtype=jnp.bool_))
        return nn.Dense(96, use_bias=False, name="head")(nn.LayerNorm()(h))


def model(seed: int = 0) -> tuple[Transformer, Any]:
    """The module and its variables, with norms and biases that are not neutral."""
    module = Transformer()
    variables = module.init(jax.random.key(seed), jnp.zeros((1, 4), jnp.int32))
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noise = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return module, jax.tree.unflatten(tree, noise)
