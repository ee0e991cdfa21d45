"""Perplexity of a decoder on a stream of tokens."""

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jgptq.data.tokens import check_tokens
from jgptq.errors import CalibrationError, NumericalError
from jgptq.models import Block, Decoder
from jgptq.models.memory import to_device
from jgptq.notation import Array, Float, Int

BATCH_TOKENS = 4096
"""Tokens in a batch, unless a single window is longer."""


@dataclasses.dataclass(frozen=True)
class Score:
    """Negative log-likelihood of a stream."""

    nll: float  # sum of negative log-likelihoods, in nats
    tokens: int  # number of predicted tokens

    @property
    def perplexity(self) -> float:
        """`exp(nll / tokens)`; infinity where that overflows."""
        mean = self.nll / self.tokens
        return math.exp(mean) if mean < 700 else math.inf


def perplexity(params: Decoder, tokens: Int[Array, " T"], seq_len: int = 2048, stride: int | None = None) -> float:
    """`exp` of the mean negative log-likelihood per predicted token; arguments and errors are those of `score`.

    Example:
      >>> tokens = jgptq.evaluation_tokens("wikitext", params.tokenizer_path)
      >>> jgptq.perplexity(params, tokens, seq_len=2048)  # windows that do not overlap, as in the literature
    """
    return score(params, tokens, seq_len, stride).perplexity


def score(params: Decoder, tokens: Int[Array, " T"], seq_len: int = 2048, stride: int | None = None) -> Score:
    """Sums the negative log-likelihood of a stream over windows.

    Without a stride the windows do not overlap, the first token of each window is not predicted, and an incomplete last window is
    dropped: this is the figure of the GPTQ literature. With a stride, each window begins `stride` tokens after the previous one,
    and only tokens that no earlier window predicted count, so that they have more context; the last window may be shorter.

    Args:
      params: the decoder, float or quantized.
      tokens: int32 ids `[T]`.
      seq_len: tokens in a window.
      stride: step between windows, 1 to seq_len, or None.

    Returns:
      The sum in nats, and the number of tokens in it.

    Raises:
      CalibrationError: too few tokens, ids outside the vocabulary, a seq_len or stride out of range.
      NumericalError: the logits hold NaN.
    """
    stream = np.asarray(tokens)
    if stream.ndim != 1:
        raise CalibrationError(f"evaluation tokens must be one stream [T], found shape {list(stream.shape)}")
    check_tokens(stream, params.config.vocab_size, "evaluation tokens")
    if seq_len < 2 or (stride is not None and not 1 <= stride <= seq_len):
        raise CalibrationError(f"seq_len must be at least 2 and stride 1 to seq_len, found seq_len {seq_len}, stride {stride}")
    if len(stream) < (seq_len if stride is None else 2):
        raise CalibrationError(
            f"{len(stream)} evaluation tokens do not fill a window of {seq_len}; give more text, or a smaller seq_len"
        )
    device = to_device(params)
    rows = max(1, BATCH_TOKENS // seq_len)
    nll, count = 0.0, 0
    for window, counted in _batched(_windows(stream, seq_len, stride), rows, seq_len):
        residual = _embed(device, jnp.asarray(window))
        for block in device.layers:
            residual = _block(block, residual)
        nll += float(_nll(device, residual, jnp.asarray(window), jnp.asarray(counted)))
        count += int(counted.sum())
    if math.isnan(nll):
        raise NumericalError("the logits hold NaN: a layer overflows, or a weight is damaged; try dtype float32")
    return Score(nll, count)


_embed = jax.jit(lambda decoder, tokens: decoder.embed(tokens))


@jax.jit
def _block(block: Block, residual: Float[jax.Array, "b S D"]) -> Float[jax.Array, "b S D"]:
    return block(residual)


@jax.jit
def _nll(
    decoder: Decoder, residual: Float[jax.Array, "b S D"], tokens: Int[jax.Array, "b S"], counted: Float[jax.Array, "b S"]
) -> Float[jax.Array, ""]:
    """The sum over a batch, one row after the other, so that only one row's logits are in memory."""

    def row(args: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        residual_sd, tokens_s, counted_s = args
        logits_sv = decoder.logits(residual_sd[None])[0]
        chosen_s = jnp.take_along_axis(logits_sv[:-1], tokens_s[1:, None], axis=-1)[:, 0]
        loss_s = jax.nn.logsumexp(logits_sv[:-1], axis=-1) - chosen_s
        # `where`, not a product: the loss of a position that does not count may be NaN.
        return jnp.sum(jnp.where(counted_s[1:] > 0, loss_s, 0.0))

    return jnp.sum(jax.lax.map(row, (residual, tokens, counted)))


def _windows(stream: np.ndarray, seq_len: int, stride: int | None) -> Iterator[tuple[np.ndarray, int]]:
    """Windows of the stream, each with the first position in it that counts."""
    if stride is None:
        for start in range(0, len(stream) - seq_len + 1, seq_len):
            yield stream[start : start + seq_len], 1
        return
    predicted = 1
    for start in range(0, len(stream), stride):
        stop = min(start + seq_len, len(stream))
        yield stream[start:stop], max(1, predicted - start)
        predicted = stop
        if stop == len(stream):
            return


def _batched(windows: Iterator[tuple[np.ndarray, int]], rows: int, seq_len: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches `[rows, seq_len]`: tokens, and 1 where a position counts. Padding is last: causal attention ignores it there."""
    tokens, counted, filled = np.zeros((rows, seq_len), np.int32), np.zeros((rows, seq_len), np.float32), 0
    for window, first in windows:
        tokens[filled, : len(window)] = window
        counted[filled, first : len(window)] = 1
        filled += 1
        if filled == rows:
            yield tokens, counted
            tokens, counted, filled = np.zeros_like(tokens), np.zeros_like(counted), 0
    if filled:
        yield tokens, counted
