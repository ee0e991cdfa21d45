"""The demonstration: a model rounded and quantized at several widths, and its export loaded again."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from converters import load_hf, save_hf
from jgptq import tinycode
from jgptq.app.report import Variant
from jgptq.data.tokens import calibration_tokens, evaluation_tokens
from jgptq.errors import JgptqError
from jgptq.evaluate.perplexity import perplexity
from jgptq.models import Decoder
from jgptq.run.driver import quantize
from jgptq.tinycode.corpus import stdlib_documents

EVALUATION_TOKENS = 65536


class DemoFailed(JgptqError):
    """The demonstration cannot run, or its result is not as expected."""


def sources(model: str, calib: str | None, data: str | None) -> tuple[str | list[str], str | list[str]]:
    """The calibration and evaluation text; for the embedded model, by default, source of the standard library and held-out files.

    Raises:
      DemoFailed: another model, without both texts.
    """
    if calib is not None and data is not None:
        return calib, data
    if model != tinycode.FOLDER:
        raise DemoFailed("a model of your own needs --calib and --data")
    return calib or stdlib_documents("train"), data or stdlib_documents("held_out")


def compare(
    params: Decoder, calib: np.ndarray, tokens: np.ndarray, seq_len: int, group_size: int, bits: Sequence[int]
) -> Iterator[tuple[Variant, Decoder]]:
    """Evaluates the float model, then round-to-nearest and GPTQ at every width, with preset "fast".

    Args:
      params: the float decoder.
      calib: calibration tokens `[samples, seq_len]`.
      tokens: evaluation tokens `[T]`.
      seq_len: tokens in a window.
      group_size: rows that share a scale.
      bits: widths of a code.

    Yields:
      A row of the table, and the decoder that it describes.
    """
    dtype = str(params.embed_tokens.embedding.get_value().dtype)
    yield _variant(dtype, "float", params, tokens, seq_len, 0.0), params
    for width in bits:
        for method, used in (("rtn", None), ("gptq", calib)):
            started = time.monotonic()
            quantized, _ = quantize(params, used, preset="fast", bits=width, group_size=group_size, method=method)
            seconds = time.monotonic() - started
            yield _variant(str(width), method.upper(), quantized, tokens, seq_len, seconds), quantized


def check_order(variants: Sequence[Variant]) -> None:
    """Checks that GPTQ lies between float and round-to-nearest at every width.

    Raises:
      DemoFailed: it does not; the message says at which width.
    """
    base = variants[0].perplexity
    for rounded, solved in zip(variants[1::2], variants[2::2], strict=True):
        if not base <= solved.perplexity <= rounded.perplexity:
            values = f"float {base:.4f}, GPTQ {solved.perplexity:.4f}, RTN {rounded.perplexity:.4f}"
            raise DemoFailed(f"at {solved.bits} bits GPTQ is not between float and round-to-nearest: {values}")


def export_and_reload(quantized: Decoder, out: Path | None, tokens: np.ndarray, seq_len: int) -> tuple[Path, float]:
    """Writes a GPTQ folder, loads it back and evaluates it.

    Args:
      quantized: the decoder.
      out: the folder to write; None uses a temporary folder that is deleted afterwards.
      tokens: evaluation tokens `[T]`.
      seq_len: tokens in a window.

    Returns:
      The folder, and the perplexity of the decoder loaded from it.
    """
    if out is not None:
        return out, perplexity(load_hf(save_hf(quantized, out)), tokens, seq_len)
    with tempfile.TemporaryDirectory() as scratch:
        folder = save_hf(quantized, Path(scratch) / "export")
        return folder, perplexity(load_hf(folder), tokens, seq_len)


def demo_tokens(
    model: str, calib: str | list[str], data: str | list[str], samples: int, seq_len: int
) -> tuple[np.ndarray, np.ndarray]:
    """Calibration rows `[samples, seq_len]` and an evaluation stream `[T]` of at most 65,536 tokens."""
    return calibration_tokens(calib, model, samples, seq_len), evaluation_tokens(data, model)[:EVALUATION_TOKENS]


def _variant(bits: str, method: str, params: Decoder, tokens: np.ndarray, seq_len: int, seconds: float) -> Variant:
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    value = perplexity(params, tokens, seq_len)
    return Variant(bits=bits, method=method, perplexity=value, nbytes=nbytes, seconds=seconds)
