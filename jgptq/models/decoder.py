"""The decoder: an embedding, blocks, a norm and an output projection."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from jgptq.errors import CalibrationError
from jgptq.models.architecture.config import LearnedPositions, ModelConfig
from jgptq.models.block import Block, Head
from jgptq.models.layers import Embedding, Linear, Norm, make_norm, softcapped
from jgptq.models.memory import copy_module
from jgptq.notation import Float, Int
from jgptq.settings.run import QuantizeConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a decoder was read from; the model never reads it, `save_hf` does."""

    folder: str  # the checkpoint's folder: tokenizer and generation settings are copied from it
    hf_config: str  # the text of its config.json without a quantization_config, so that keys we do not model survive


class Decoder(nnx.Module):
    """A causal language model; `config` says which of the architectures of `jgptq.models.architecture.families`.

    Called on int32 tokens `[b, S]` it returns float32 logits `[b, S, V]`. Leaves may be views of a mapped file, of any float
    dtype:
    they are cast to `config.dtype` where they are used.

    Args:
      config: the architecture's switches.
      rngs: source of initial parameters.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.embedding_width or config.hidden_size
        learned = config.positions if isinstance(config.positions, LearnedPositions) else None
        rows = 0 if learned is None else learned.max_position_embeddings + learned.offset
        self.embed_tokens = Embedding(config.vocab_size, width, rngs=rngs)
        self.embed_positions = Embedding(rows, config.hidden_size, rngs=rngs) if learned else None
        self.project_in = Linear(width, config.hidden_size, rngs=rngs) if config.projects else None
        self.layers = nnx.List(
            [
                Block(config, window, sparse=sparse, rngs=rngs)
                for window, sparse in zip(config.layer_windows, config.sparse_layers, strict=True)
            ]
        )
        self.norm = make_norm(config) if config.has_final_norm else None
        self.project_out = Linear(config.hidden_size, width, rngs=rngs) if config.projects else None
        self.lm_head = None if config.tie_word_embeddings else Linear(width, config.vocab_size, rngs=rngs)
        self.origin: Origin | None = None
        self.quantization: QuantizeConfig | None = None

    @property
    def tokenizer_path(self) -> str:
        """The folder to read the tokenizer from."""
        if self.origin is None:
            raise ValueError("this decoder was not read from a folder, so it has no tokenizer; pass one explicitly")
        return self.origin.folder

    def embed(self, tokens: Int[jax.Array, "b S"]) -> Float[jax.Array, "b S D"]:
        """The residual stream before the first block.

        Raises:
          CalibrationError: more positions than a table of learned ones has.
        """
        config, dtype = self.config, self.config.compute_dtype
        residual = self.embed_tokens(tokens, dtype)
        if config.embedding_scaled:
            residual = residual * jnp.asarray(math.sqrt(config.hidden_size), dtype)
        if self.project_in is not None:
            residual = self.project_in(residual)
        if self.embed_positions is not None and isinstance(config.positions, LearnedPositions):
            length, most = tokens.shape[1], config.positions.max_position_embeddings
            if length > most:
                raise CalibrationError(f"expected sequences of at most {most} positions, found {length}; try a smaller seq_len")
            places = jnp.arange(length)[None, :] + config.positions.offset
            residual = residual + self.embed_positions(places, dtype)
        return residual

    def logits(self, residual: Float[jax.Array, "b S D"]) -> Float[jax.Array, "b S V"]:
        """Float32 logits from the residual stream after the last block."""
        h = residual if self.norm is None else self.norm(residual)
        if self.project_out is not None:
            h = self.project_out(h)
        logits = self.embed_tokens.attend(h) if self.lm_head is None else self.lm_head(h).astype(jnp.float32)
        return softcapped(logits, self.config.final_logit_softcapping)

    def head(self) -> Head | None:
        """What follows the last block, as a unit; None where the output projection is tied to the embedding."""
        return None if self.lm_head is None else Head(self.config, self.norm, self.project_out, self.lm_head)

    def before(self) -> dict[str, nnx.Module]:
        """The modules before the blocks, by name."""
        return self._present("embed_tokens", "embed_positions", "project_in")

    def after(self) -> dict[str, nnx.Module]:
        """The modules after the blocks, by name."""
        return self._present("norm", "project_out", "lm_head")

    def _present(self, *names: str) -> dict[str, nnx.Module]:
        return {name: module for name in names if (module := getattr(self, name)) is not None}

    def norms(self) -> dict[str, Norm]:
        """The norms outside of the blocks, by path."""
        return {} if self.norm is None else {"norm": self.norm}

    def embedder(self) -> "Decoder":
        """The part that `embed` needs: a decoder without blocks, last norm and output projection, which shares its leaves."""
        part = self.without_blocks()
        part.norm = part.project_out = part.lm_head = None
        return part

    def without_blocks(self) -> "Decoder":
        """The part that `embed` and `logits` need: a decoder without blocks, which shares its leaves."""
        part = copy_module(self)
        part.layers = nnx.List([])
        return part

    def __call__(self, tokens: Int[jax.Array, "b S"]) -> Float[jax.Array, "b S V"]:
        """Float32 logits of every position."""
        residual = self.embed(tokens)
        for block in self.layers:
            residual = block(residual)
        return self.logits(residual)
