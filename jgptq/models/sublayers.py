"""The two sublayers of a decoder block: their linears, and what happens between them."""

from collections.abc import Callable

import jax
from flax import nnx

from jgptq.models.architecture.config import AlibiPositions, ModelConfig
from jgptq.models.attention import Scoring, alibi_slopes, causal_attention
from jgptq.models.layers import Linear, RMSNorm
from jgptq.models.rotary import RopeConfig, rotary_tables, rotate
from jgptq.notation import Float


class Attention(nnx.Module):
    """Projections and norms of grouped-query attention.

    Args:
      config: the decoder's switches.
      window: positions that a query sees, itself included; None for all before it.
      rngs: source of initial kernels.
    """

    def __init__(self, config: ModelConfig, window: int | None, *, rngs: nnx.Rngs):
        heads, kv, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = Linear(config.hidden_size, heads * width, use_bias=config.qkv_bias, rngs=rngs)
        self.k_proj = Linear(config.hidden_size, kv * width, use_bias=config.qkv_bias, rngs=rngs)
        self.v_proj = Linear(config.hidden_size, kv * width, use_bias=config.qkv_bias, rngs=rngs)
        self.o_proj = Linear(heads * width, config.hidden_size, use_bias=config.o_bias, rngs=rngs)
        normed = {None: (0, 0), "head": (width, width), "width": (heads * width, kv * width)}[config.qk_norm]
        self.q_norm = RMSNorm(normed[0], config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(normed[1], config.norm_eps) if config.qk_norm else None
        self.config = config
        self.window = window

    def mix(
        self, q: Float[jax.Array, "b S N"], k: Float[jax.Array, "b S M"], v: Float[jax.Array, "b S M"]
    ) -> Float[jax.Array, "b S N"]:
        """Causal attention over projected queries, keys and values; the heads' outputs side by side."""
        config, (batch, length) = self.config, q.shape[:2]
        if self.q_norm is not None and self.k_norm is not None and config.qk_norm == "width":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.reshape(batch, length, -1, config.head_dim) for y in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None and config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if isinstance(config.positions, RopeConfig):
            cos, sin = rotary_tables(config.positions, config.head_dim, length)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        slopes = alibi_slopes(config.num_attention_heads) if isinstance(config.positions, AlibiPositions) else None
        scale = (config.query_pre_attn_scalar or config.head_dim) ** -0.5
        scoring = Scoring(scale=scale, softcap=config.attn_logit_softcapping, window=self.window)
        mixed = causal_attention(q, k, v, scoring, slopes)
        return mixed.reshape(batch, length, -1)


class MLP(nnx.Module):
    """Projections of the MLP: `down(act(gate(h)) * up(h))`, or `down(act(up(h)))` without a gate.

    Args:
      config: the decoder's switches.
      rngs: source of initial kernels.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        if config.gated_mlp:
            self.gate_proj = Linear(width, inner, use_bias=bias, rngs=rngs)
        self.up_proj = Linear(width, inner, use_bias=bias, rngs=rngs)
        self.down_proj = Linear(inner, width, use_bias=bias, rngs=rngs)
        self.hidden_act = config.hidden_act

    def activate(self, opening: Float[jax.Array, "b S K"]) -> Float[jax.Array, "b S K"]:
        """The activation, elementwise."""
        return _ACTIVATIONS[self.hidden_act](opening)


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """An activation function by its name in configs."""
    return _ACTIVATIONS[name]


_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}
