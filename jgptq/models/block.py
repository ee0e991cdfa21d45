"""A decoder block as a list of stages: one idea for the forward pass, the calibration and the quantization."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
from flax import nnx

from jgptq.models.attention import causal_attention
from jgptq.models.config import ModelConfig
from jgptq.models.layers import Fused, Linear, RMSNorm
from jgptq.models.rotary import rotary_tables, rotate
from jgptq.notation import Float


class Carry(NamedTuple):
    """What flows from stage to stage."""

    residual: Float[jax.Array, "b S D"]  # the residual stream
    branch: Float[jax.Array, "b S K"] | None = (
        None  # what the next stage's linears read, where they do not read the stream's norm
    )


@dataclasses.dataclass(frozen=True)
class Stage:
    """Linears that read the same activations, so that they share one Hessian.

    The block's forward pass is `carry = combine(carry, [linear(inputs(carry)) for linear in linears])` over its stages. One that
    was made for serving (`jgptq.for_serving`) has the linears of a stage in `fused` instead.
    """

    names: tuple[str, ...]  # dotted paths of the linears within the block
    linears: tuple[Linear, ...]  # the linears themselves, in the order of `names`
    inputs: Callable[[Carry], jax.Array]  # what all of them read, [b, S, K]
    combine: Callable[[Carry, list[jax.Array]], Carry]  # what follows them
    adds: bool = False  # whether the output is added to the residual stream of the carry, as it is
    fused: Fused | None = None  # then `linears` is empty

    def __call__(self, carry: Carry) -> Carry:
        """Runs the stage."""
        h = self.inputs(carry)
        return self.combine(carry, [linear(h) for linear in self.linears] if self.fused is None else self.fused(h))


class Attention(nnx.Module):
    """Projections and norms of grouped-query attention with rotary positions.

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
        self.q_norm = RMSNorm(width, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(width, config.rms_norm_eps) if config.qk_norm else None
        self.qkv: Fused | None = None
        self.config = config
        self.window = window

    def mix(
        self, q: Float[jax.Array, "b S N"], k: Float[jax.Array, "b S M"], v: Float[jax.Array, "b S M"]
    ) -> Float[jax.Array, "b S N"]:
        """Causal attention over projected queries, keys and values; the heads' outputs side by side."""
        batch, length = q.shape[:2]
        q, k, v = (y.reshape(batch, length, -1, self.config.head_dim) for y in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = rotary_tables(self.config.rope, self.config.head_dim, length)
        mixed = causal_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, self.window)
        return mixed.reshape(batch, length, -1)


class MLP(nnx.Module):
    """Projections of the gated MLP: `down(act(gate(h)) * up(h))`.

    Args:
      config: the decoder's switches.
      rngs: source of initial kernels.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(width, inner, use_bias=bias, rngs=rngs)
        self.up_proj = Linear(width, inner, use_bias=bias, rngs=rngs)
        self.down_proj = Linear(inner, width, use_bias=bias, rngs=rngs)
        self.gate_up: Fused | None = None
        self.hidden_act = config.hidden_act

    def gated(self, gate: Float[jax.Array, "b S K"], up: Float[jax.Array, "b S K"]) -> Float[jax.Array, "b S K"]:
        """The activation of the gate times the up projection."""
        return _ACTIVATIONS[self.hidden_act](gate) * up


_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


class Block(nnx.Module):
    """One pre-norm decoder block; submodules are named as in Hugging Face checkpoints.

    Args:
      config: the decoder's switches.
      window: positions that attention sees; None for all.
      rngs: source of initial kernels.
    """

    def __init__(self, config: ModelConfig, window: int | None, *, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, window, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, rngs=rngs)

    def stages(self) -> tuple[Stage, ...]:
        """The four stages of a dense block: q/k/v, the attention's output, gate/up, down."""
        attn, mlp = self.self_attn, self.mlp

        def branch(carry: Carry) -> jax.Array:
            if carry.branch is None:
                raise ValueError("this stage reads the branch that the stage before it leaves in the carry")
            return carry.branch

        def add(carry: Carry, outs: list[jax.Array]) -> Carry:
            return Carry(carry.residual + outs[0])

        return (
            Stage(
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                () if attn.qkv else (attn.q_proj, attn.k_proj, attn.v_proj),
                lambda carry: self.input_layernorm(carry.residual),
                lambda carry, outs: Carry(carry.residual, attn.mix(*outs)),
                fused=attn.qkv,
            ),
            Stage(("self_attn.o_proj",), (attn.o_proj,), branch, add, adds=True),
            Stage(
                ("mlp.gate_proj", "mlp.up_proj"),
                () if mlp.gate_up else (mlp.gate_proj, mlp.up_proj),
                lambda carry: self.post_attention_layernorm(carry.residual),
                lambda carry, outs: Carry(carry.residual, mlp.gated(*outs)),
                fused=mlp.gate_up,
            ),
            Stage(("mlp.down_proj",), (mlp.down_proj,), branch, add, adds=True),
        )

    def __call__(self, residual: Float[jax.Array, "b S D"]) -> Float[jax.Array, "b S D"]:
        """Runs all stages on a residual stream."""
        carry = Carry(residual)
        for stage in self.stages():
            carry = stage(carry)
        return carry.residual


class Head(nnx.Module):
    """What follows the last block, as a block of one stage: the output projection, which reads the norm of the residual stream.

    Args:
      norm: the decoder's last norm.
      lm_head: the output projection.
    """

    def __init__(self, norm: RMSNorm, lm_head: Linear):
        self.norm = norm
        self.lm_head = lm_head

    def stages(self) -> tuple[Stage, ...]:
        """The output projection."""
        return (Stage(("lm_head",), (self.lm_head,), lambda carry: self.norm(carry.residual), lambda _, outs: Carry(outs[0])),)


Unit = Block | Head
"""What is quantized as one: its linears share a place in a sink."""
