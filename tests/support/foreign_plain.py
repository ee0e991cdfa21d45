"""A decoder as a function of a dict: einsum heads, layers stacked for a scan, one weight transposed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

VOCAB, WIDTH, INNER, LAYERS, HEADS = 80, 64, 96, 2, 4

Tree = dict[str, Any]


def rms(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * (1.0 + scale)[None, None, :]


def layer(h: jax.Array, p: Tree, see: Callable[[str, jax.Array], Any] = lambda name, x: None) -> tuple[jax.Array, jax.Array]:
    """One layer; `see` is shown what its linears read."""
    x = rms(h, p["norm"])
    see("q k v", x)
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in ("q", "k", "v"))
    scores = jnp.einsum("bthk,bshk->bhts", q, k) * (WIDTH // HEADS) ** -0.5
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(causal[None, None], scores, -1e9), axis=-1)
    mixed = jnp.einsum("bhts,bshk->bthk", weights, v)
    see("o", mixed)
    h = h + jnp.einsum("bthk,hkd->btd", mixed, p["o"])
    x = rms(h, p["mlp_norm"])
    see("gate up", x)
    x = jax.nn.silu(x @ p["gate"]["kernel"]) * (x @ p["up"]["kernel"])
    see("down", x)
    return h + x @ p["down"]["kernel"].T, jnp.mean(h)


def forward(tree: Tree, tokens: jax.Array) -> jax.Array:
    """Logits `[b, S, 96]`."""
    h = tree["embed"][tokens]
    h, _ = jax.lax.scan(jax.checkpoint(layer), h, tree["layers"])
    return h @ tree["head"].reshape(WIDTH, -1)


def model(seed: int = 0) -> Tree:
    """A random tree."""
    random = np.random.default_rng(seed)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(random.normal(size=shape) * 0.15, jnp.float32)

    heads = (HEADS, WIDTH // HEADS)
    return {
        "embed": draw(VOCAB, WIDTH),
        "layers": {
            **{name: draw(LAYERS, WIDTH, *heads) for name in ("q", "k", "v")},
            "o": draw(LAYERS, *heads, WIDTH),
            "gate": {"kernel": draw(LAYERS, WIDTH, INNER)},
            "up": {"kernel": draw(LAYERS, WIDTH, INNER)},
            "down": {"kernel": draw(LAYERS, WIDTH, INNER)},  # [N, K]
            "norm": draw(LAYERS, WIDTH),
            "mlp_norm": draw(LAYERS, WIDTH),
        },
        "head": draw(WIDTH, 2, 48),
    }
