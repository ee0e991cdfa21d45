"""Switches of the decoder; a name is the key of a Hugging Face config where most families share one."""

import dataclasses

import jax.numpy as jnp

from jgptq.models.architecture.experts import ExpertsConfig
from jgptq.models.architecture.latent import LatentConfig
from jgptq.models.rotary import RopeConfig

ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "relu2")
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnedPositions:
    """A table of position vectors that is added to the token vectors."""

    max_position_embeddings: int  # positions that a sequence may have
    offset: int = 0  # row of the table that belongs to position 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlibiPositions:
    """A linear penalty on distance in the attention's scores (arXiv 2108.12409)."""

    max_position_embeddings: int  # positions that the model was made for; more are accepted
    scaled: bool = False  # the penalty is divided by sqrt(F), as the products of queries and keys are
    dtype: str = "float32"  # what slopes, positions and their products are rounded to


Positions = RopeConfig | LearnedPositions | AlibiPositions


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """What the blocks of one decoder may differ in."""

    window: int | None = None  # positions that attention sees, the query's own included; None for all before it
    rope: RopeConfig | None = None  # rotary settings; None where queries and keys are not rotated
    sparse: bool = False  # whether the MLP is a mixture of experts


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder; the rows of `jgptq.models.architecture.families` say which switches an architecture sets."""

    model_type: str = "llama"  # a key of `FAMILIES`
    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # width of the MLP
    num_hidden_layers: int  # L
    num_attention_heads: int  # H
    num_key_value_heads: int  # J; J < H is grouped-query attention
    head_dim: int  # F
    hidden_act: str = "silu"  # activation of the MLP
    gated_mlp: bool = True  # `down(act(gate(h)) * up(h))`, else `down(act(up(h)))`
    gate_up_fused: bool = False  # gate and up are one linear, whose output is theirs side by side
    qkv_layout: str | None = None  # None: three linears; stacked or grouped: one, see `jgptq.models.sublayers.split_qkv`
    block_form: str = "pre"  # where norms stand; the forms are listed in `jgptq.models.block.Block`
    norm: str = "rms"  # rms or layer
    norm_eps: float = 1e-6  # added to the mean square, or to the variance
    norm_affine: bool = True  # norms have a scale, and a layer norm may have a bias
    norm_bias: bool = False  # layer norms have a bias
    norm_offset: float = 0.0  # what is added to the stored scale of a norm
    final_norm: bool = True  # a norm follows the last block; not where blocks end with one
    positions: Positions = dataclasses.field(default_factory=RopeConfig)  # rotary, learned or ALiBi
    rotary_pairs: str = "halves"  # features rotated together: f and f + F/2 (halves), or 2f and 2f + 1 (neighbours)
    layer_ropes: tuple[RopeConfig | None, ...] | None = None  # per block, None for no rotation; None: `positions` in all
    embedding_width: int | None = None  # width of token vectors, projected to D; None: D
    embedding_scaled: bool = False  # token vectors are multiplied by sqrt(D)
    embedding_norm: bool = False  # token vectors are normed before the first block
    embedding_multiplier: float = 1.0  # factor of the token vectors
    residual_multiplier: float = 1.0  # factor of what a pre-norm or parallel block adds to the stream
    tie_word_embeddings: bool = False  # the output projection is the embedding
    qkv_bias: bool = False  # biases on q, k, v
    o_bias: bool = False  # bias on the attention's output projection
    mlp_bias: bool = False  # biases in the MLP
    lm_head_bias: bool = False  # bias on the output projection, which is not tied then
    clip_qkv: float | None = None  # outputs of q, k, v are clipped to this magnitude
    qk_norm: str | None = None  # norm of queries and keys: "head" (one scale for all heads), "heads" (one each), "width", or none
    query_pre_attn_scalar: float | None = None  # scores are divided by its square root; None: head_dim
    attention_multiplier: float | None = None  # factor of scores; None: by `query_pre_attn_scalar`
    attn_logit_softcapping: float | None = None  # a bound that scores approach, see `jgptq.models.layers.softcapped`
    final_logit_softcapping: float | None = None  # the same of the logits
    logit_scale: float = 1.0  # logits are multiplied by it
    logits_scaling: float = 1.0  # logits are divided by it
    experts: ExpertsConfig | None = None  # mixtures of experts in place of some MLPs; None: every MLP is dense
    latent: LatentConfig | None = None  # keys and values come from one narrow vector a token; None: grouped-query attention
    layer_windows: tuple[int | None, ...]  # per block: positions that attention sees, None for all
    dtype: str = "float32"  # what activations are computed in: float32 or bfloat16

    @property
    def compute_dtype(self) -> jnp.dtype:
        """`dtype` as jax's own."""
        return jnp.dtype(self.dtype)

    @property
    def layers(self) -> tuple[LayerConfig, ...]:
        """What each block is made with."""
        shared = self.positions if isinstance(self.positions, RopeConfig) else None
        ropes = (shared,) * len(self.layer_windows) if self.layer_ropes is None else self.layer_ropes
        each = zip(self.layer_windows, ropes, self.sparse_layers, strict=True)
        return tuple(LayerConfig(window=window, rope=rope, sparse=sparse) for window, rope, sparse in each)

    @property
    def sparse_layers(self) -> tuple[bool, ...]:
        """Which blocks have a mixture of experts in place of an MLP."""
        return (False,) * len(self.layer_windows) if self.experts is None else self.experts.sparse_layers

    @property
    def has_final_norm(self) -> bool:
        """Whether a norm follows the last block: a post-norm block has normed the stream already."""
        return self.final_norm and self.block_form != "post"

    @property
    def projects(self) -> bool:
        """Whether token vectors are narrower or wider than the residual stream, and are projected to it and back."""
        return self.embedding_width not in (None, self.hidden_size)
