"""Latent attention: the linears of the sublayer, and the stages of a block that has it."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jgptq.models.architecture.config import LayerConfig, ModelConfig
from jgptq.models.attention import Scoring, causal_attention
from jgptq.models.layers import Linear, RMSNorm
from jgptq.models.rotary import rotary_tables, rotate
from jgptq.models.stages import RESIDUAL, Fusion, Stage, Step
from jgptq.notation import Float

_EPS = 1e-6  # of the norms of latent vectors, whatever the config says of the others


class LatentAttention(nnx.Module):
    """Projections and norms of latent attention (MLA, arXiv 2405.04434, section 2.1).

    Args:
      config: the decoder's switches, with those of latent attention.
      layer: the rotation of this block.
      rngs: source of initial kernels.
    """

    def __init__(self, config: ModelConfig, layer: LayerConfig, *, rngs: nnx.Rngs):
        assert config.latent is not None
        assert layer.rope is not None
        latent, width, heads = config.latent, config.hidden_size, config.num_attention_heads
        queries = heads * (latent.plain + config.head_dim)
        if latent.query_rank is None:
            self.q_proj = Linear(width, queries, rngs=rngs)
        else:
            self.q_a_proj = Linear(width, latent.query_rank, use_bias=config.qkv_bias, rngs=rngs)
            self.q_a_layernorm = RMSNorm(latent.query_rank, _EPS)
            self.q_b_proj = Linear(latent.query_rank, queries, rngs=rngs)
        self.kv_a_proj_with_mqa = Linear(width, latent.kv_rank + config.head_dim, use_bias=config.qkv_bias, rngs=rngs)
        self.kv_a_layernorm = RMSNorm(latent.kv_rank, _EPS)
        self.kv_b_proj = Linear(latent.kv_rank, heads * (latent.plain + latent.value), rngs=rngs)
        self.o_proj = Linear(heads * latent.value, width, use_bias=config.o_bias, rngs=rngs)
        self.config = config
        self.latent = latent
        self.rope = layer.rope

    def split(self, opened: Float[jax.Array, "b S N"]) -> tuple[Float[jax.Array, "b S R"], Float[jax.Array, "b S F"]]:
        """The vector that keys and values come from, and the rotary features of the keys."""
        return opened[..., : self.latent.kv_rank], opened[..., self.latent.kv_rank :]

    def mix(
        self, q: Float[jax.Array, "b S N"], kv: Float[jax.Array, "b S M"], shared_k: Float[jax.Array, "b S F"]
    ) -> Float[jax.Array, "b S N"]:
        """Causal attention over projected queries, keys with values, and shared keys; the heads' outputs side by side."""
        config, latent, (batch, length) = self.config, self.latent, q.shape[:2]
        q, kv = (y.reshape(batch, length, config.num_attention_heads, -1) for y in (q, kv))
        plain_k, v = kv[..., : latent.plain], kv[..., latent.plain :]
        turned_k = jnp.broadcast_to(self._turned(shared_k[:, :, None]), (*plain_k.shape[:3], config.head_dim))
        q = jnp.concatenate([q[..., : latent.plain], self._turned(q[..., latent.plain :])], axis=-1)
        k = jnp.concatenate([plain_k, turned_k], axis=-1)
        return causal_attention(q, k, v, Scoring(scale=self._scale())).reshape(batch, length, -1)

    def _turned(self, x: Float[jax.Array, "b S H F"]) -> Float[jax.Array, "b S H F"]:
        """Rotated by position."""
        cos, sin = rotary_tables(self.rope, self.config.head_dim, x.shape[1])
        return rotate(x, cos, sin, self.config.rotary_pairs)

    def _scale(self) -> float:
        """`1 / sqrt(F)`, times the square of YaRN's factor where the config has `mscale_all_dim`."""
        return (self.latent.plain + self.config.head_dim) ** -0.5 * self.rope.score_factor


@functools.cache
def latent_stages(config: ModelConfig) -> tuple[Stage, ...]:
    """The stages of latent attention up to its output projection: what reads the stream, and what reads each latent vector."""
    assert config.latent is not None
    direct = config.latent.query_rank is None
    query, key = ("self_attn.q_proj" if direct else "self_attn.q_a_proj"), "self_attn.kv_a_proj_with_mqa"
    opening = Stage(
        linears=(query, key),
        reads=RESIDUAL,
        through=("attn_norm",),
        steps=(
            Step(name="keep", of=(query,), to="queries" if direct else "query_latent"),
            Step(name="latent", of=(key,), to="kv_latent"),
            Step(name="shared_keys", of=(key,), to="shared_keys"),
        ),
        fusions=() if direct else (Fusion(name="self_attn.fused_qkv_a_proj", linears=(query, key)),),
        absorber="attn_norm",
    )
    queries = Stage(
        linears=("self_attn.q_b_proj",),
        reads="query_latent",
        through=("self_attn.q_a_layernorm",),
        steps=(Step(name="keep", of=("self_attn.q_b_proj",), to="queries"),),
        absorber="self_attn.q_a_layernorm",
    )
    attend = Step(name="latent_attention", of=("self_attn.kv_b_proj",), to="attended", takes=("queries", "shared_keys"))
    keys = Stage(
        linears=("self_attn.kv_b_proj",),
        reads="kv_latent",
        through=("self_attn.kv_a_layernorm",),
        steps=(attend,),
        absorber="self_attn.kv_a_layernorm",
    )
    return (opening, keys) if direct else (opening, queries, keys)
