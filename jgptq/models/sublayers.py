"""The two sublayers of a decoder block: their linears, and what happens between them."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jgptq.models.architecture.config import AlibiPositions, LayerConfig, ModelConfig
from jgptq.models.attention import Scoring, alibi_bias, causal_attention
from jgptq.models.layers import Linear, make_norm, split_features
from jgptq.models.rotary import rotary_tables, rotate
from jgptq.notation import Float


class Attention(nnx.Module):
    """Projections and norms of grouped-query attention.

    Args:
      config: the decoder's switches.
      layer: the window and the rotation of this block.
      rngs: source of initial kernels.
    """

    def __init__(self, config: ModelConfig, layer: LayerConfig, *, rngs: nnx.Rngs):
        heads, kv, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        if config.qkv_layout is None:
            self.q_proj = Linear(config.hidden_size, heads * width, use_bias=config.qkv_bias, rngs=rngs)
            self.k_proj = Linear(config.hidden_size, kv * width, use_bias=config.qkv_bias, rngs=rngs)
            self.v_proj = Linear(config.hidden_size, kv * width, use_bias=config.qkv_bias, rngs=rngs)
        else:
            self.qkv_proj = Linear(config.hidden_size, (heads + 2 * kv) * width, use_bias=config.qkv_bias, rngs=rngs)
        self.o_proj = Linear(heads * width, config.hidden_size, use_bias=config.o_bias, rngs=rngs)
        self.q_norm = make_norm(config, _scales(config.qk_norm, heads, width)) if config.qk_norm else None
        self.k_norm = make_norm(config, _scales(config.qk_norm, kv, width)) if config.qk_norm else None
        self.config = config
        self.layer = layer

    def parts(self, outputs: Sequence[jax.Array]) -> list[jax.Array]:
        """Queries, keys and values from the outputs of the three linears that make them, or of the one."""
        return list(outputs) if self.config.qkv_layout is None else split_qkv(outputs[0], self.config)

    def mix(
        self, q: Float[jax.Array, "b S N"], k: Float[jax.Array, "b S M"], v: Float[jax.Array, "b S M"]
    ) -> Float[jax.Array, "b S N"]:
        """Causal attention over projected queries, keys and values; the heads' outputs side by side."""
        config, (batch, length) = self.config, q.shape[:2]
        if config.clip_qkv is not None:
            q, k, v = (jnp.clip(y, -config.clip_qkv, config.clip_qkv) for y in (q, k, v))
        if config.qk_norm == "width":
            q, k = self._normed(q, k)
        q, k, v = (y.reshape(batch, length, -1, config.head_dim) for y in (q, k, v))
        if config.qk_norm in ("head", "heads"):
            q, k = self._normed(q, k)
        if self.layer.rope is not None:
            cos, sin = rotary_tables(self.layer.rope, config.head_dim, length)
            q, k = (rotate(y, cos, sin, config.rotary_pairs) for y in (q, k))
        scale = config.attention_multiplier
        scale = (config.query_pre_attn_scalar or config.head_dim) ** -0.5 if scale is None else scale
        scoring = Scoring(scale=scale, softcap=config.attn_logit_softcapping, window=self.layer.window)
        bias = None
        if isinstance(config.positions, AlibiPositions):
            factor = scale if config.positions.scaled else 1.0
            bias = factor * alibi_bias(config.num_attention_heads, length, config.positions.dtype)
        mixed = causal_attention(q, k, v, scoring, bias)
        return mixed.reshape(batch, length, -1)

    def _normed(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Queries and keys after their norms, where there are norms."""
        return q if self.q_norm is None else self.q_norm(q), k if self.k_norm is None else self.k_norm(k)


def _scales(qk_norm: str, heads: int, width: int) -> int | tuple[int, int]:
    """The shape of the scale of a norm of queries or keys."""
    shapes: dict[str, int | tuple[int, int]] = {"head": width, "heads": (heads, width), "width": heads * width}
    return shapes[qk_norm]


def split_qkv(y: Float[jax.Array, "b S N"], config: ModelConfig) -> list[jax.Array]:
    """Queries `[b, S, H F]`, keys and values `[b, S, J F]` from the output of the one linear that makes them.

    Its features are laid out as

        stacked  all queries, then all keys, then all values
        grouped  for each key-value head: the queries that share it, its key, its value
    """
    heads, shared, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    if config.qkv_layout == "stacked":
        return split_features(y, (heads * width, shared * width, shared * width))
    groups = y.reshape(*y.shape[:2], shared, heads // shared + 2, width)
    return [part.reshape(*y.shape[:2], -1) for part in (groups[..., :-2, :], groups[..., -2, :], groups[..., -1, :])]


class MLP(nnx.Module):
    """Projections of the MLP: `down(act(gate(h)) * up(h))`, or `down(act(up(h)))` without a gate.

    Args:
      config: the decoder's switches.
      rngs: source of initial kernels.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        if config.gate_up_fused:
            self.gate_up_proj = Linear(width, 2 * inner, use_bias=bias, rngs=rngs)
        else:
            if config.gated_mlp:
                self.gate_proj = Linear(width, inner, use_bias=bias, rngs=rngs)
            self.up_proj = Linear(width, inner, use_bias=bias, rngs=rngs)
        self.down_proj = Linear(inner, width, use_bias=bias, rngs=rngs)
        self.hidden_act = config.hidden_act
        self.gate_up_fused = config.gate_up_fused

    def gated(self, outputs: Sequence[jax.Array]) -> Float[jax.Array, "b S K"]:
        """`act(gate) * up`, from the outputs of the two linears that make gate and up, or of the one."""
        gate, up = jnp.split(outputs[0], 2, axis=-1) if self.gate_up_fused else outputs
        return self.activate(gate) * up

    def activate(self, opening: Float[jax.Array, "b S K"]) -> Float[jax.Array, "b S K"]:
        """The activation, elementwise."""
        return _ACTIVATIONS[self.hidden_act](opening)


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """An activation function by its name in configs."""
    return _ACTIVATIONS[name]


_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_fast": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}
