"""A decoder in Flax's NNX, a list of layers called one after the other, with an output projection that a bias follows."""

import jax
import jax.numpy as jnp
from flax import nnx

VOCAB, WIDTH, INNER, LAYERS, HEADS = 80, 64, 96, 2, 4


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.gate = nnx.Linear(WIDTH, INNER, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, INNER, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(INNER, WIDTH, rngs=rngs)

    def __call__(self, h: jax.Array, mask: jax.Array) -> jax.Array:
        h = h + self.attention(self.norm(h), mask=mask)
        x = self.mlp_norm(h)
        return h + self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Transformer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.layers = nnx.List([Layer(rngs) for _ in range(LAYERS)])
        self.head = nnx.Linear(WIDTH, 96, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        h = self.embed(tokens)
        mask = nnx.make_causal_mask(tokens, dtype=jnp.bool_)
        for layer in self.layers:
            h = layer(h, mask)
        return self.head(h)


def model(seed: int = 0) -> Transformer:
    """The module, with norms and biases that are not neutral."""
    module = Transformer(nnx.Rngs(seed))
    state = nnx.state(module, nnx.Param)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noise = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    nnx.update(module, jax.tree.unflatten(tree, noise))
    return module
