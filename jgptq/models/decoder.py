"""The decoder: an embedding, blocks, a norm and an output projection."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from jgptq.models.block import Block
from jgptq.models.config import ModelConfig
from jgptq.models.layers import Embedding, Linear, RMSNorm
from jgptq.notation import Float, Int
from jgptq.settings.run import QuantizeConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a decoder was read from; the model never looks at it, those who save it do."""

    folder: str  # the checkpoint's folder: tokenizer and generation settings are copied from it
    hf_config: str  # the text of its config.json without a quantization_config, so that keys we do not model survive


class Decoder(nnx.Module):
    """A causal language model of the Llama family.

    Called on int32 tokens `[b, S]` it returns float32 logits `[b, S, V]`. Leaves may be views of a mapped file, of any float
    dtype:
    they are cast to `config.dtype` where they are used.

    Args:
      config: the architecture's switches.
      rngs: source of initial parameters.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, rngs=rngs)
        self.layers = nnx.List([Block(config, window, rngs=rngs) for window in config.layer_windows])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, rngs=rngs)
        self.origin: Origin | None = None
        self.quantization: QuantizeConfig | None = None

    @property
    def tokenizer_path(self) -> str:
        """The folder to read the tokenizer from."""
        if self.origin is None:
            raise ValueError("this decoder was not read from a folder, so it has no tokenizer; pass one explicitly")
        return self.origin.folder

    def embed(self, tokens: Int[jax.Array, "b S"]) -> Float[jax.Array, "b S D"]:
        """The residual stream before the first block."""
        return self.embed_tokens(tokens, self.config.compute_dtype)

    def logits(self, residual: Float[jax.Array, "b S D"]) -> Float[jax.Array, "b S V"]:
        """Float32 logits from the residual stream after the last block."""
        h = self.norm(residual)
        if self.lm_head is None:
            return self.embed_tokens.attend(h)
        return self.lm_head(h).astype(jnp.float32)

    def __call__(self, tokens: Int[jax.Array, "b S"]) -> Float[jax.Array, "b S V"]:
        """Float32 logits of every position."""
        residual = self.embed(tokens)
        for block in self.layers:
            residual = block(residual)
        return self.logits(residual)
