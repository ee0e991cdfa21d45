"""Calibration and evaluation tokens, from datasets, files, texts or arrays of ids."""

import itertools
import logging
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jgptq.data.sources import Source, Text, load_or_raise, resolve, source_name
from jgptq.errors import CalibrationError
from jgptq.notation import Array, Int

FEW_SAMPLES = 128  # with fewer rows than this a Hessian is a poor estimate
_BATCH = 64  # documents tokenized at a time


def calibration_tokens(
    source: Source, tokenizer: Any = None, samples: int = 512, seq_len: int = 2048, seed: int = 0
) -> Int[np.ndarray, "b S"]:
    """Rows of token ids to calibrate on, drawn at random.

    Documents are tokenized one by one, with the special tokens that the tokenizer adds by default, in random order, until there
    are twice as many tokens as needed, and concatenated to one stream. The rows are windows of the stream that do not overlap;
    where the first one starts, and which are taken, is random. Ids given as `[T]` are such a stream. Of ids given as
    `[samples, S]` random rows are taken, cut to `seq_len`.

    Args:
      source: a named dataset (`jgptq.data.sources.DATASETS`); a dataset of the hub, "owner/name" or "owner/name:config", with a
        column text or content, of which the split train is read, or validation where there is no train (all splits are
        downloaded); a path: .txt (one document), .jsonl or .parquet (a field text or content), .npy (ids); a list of documents;
        or integer ids, `[T]` or `[samples, S]` with S >= seq_len.
      tokenizer: folder or hub id of a tokenizer; or a tokenizer of transformers (an object that is called) or of tokenizers (one
        that has `encode`). Not needed for ids.
      samples: number of rows.
      seq_len: tokens in a row.
      seed: seed of all random choices.

    Returns:
      int32 `[samples, seq_len]`; fewer rows where the source holds fewer, and a UserWarning where they are fewer than 128.

    Raises:
      CalibrationError: the source is unknown, missing, unreadable, empty or shorter than a row, or there is no tokenizer.

    Example:
      >>> calibration_tokens("wikitext", "Qwen/Qwen3-0.6B", samples=512, seq_len=2048).shape  # downloads the dataset
      (512, 2048)
      >>> calibration_tokens(np.arange(4096), samples=128, seq_len=32).shape  # ids: no tokenizer
      (128, 32)
    """
    if samples < 1 or seq_len < 1:
        raise CalibrationError(f"expected samples and seq_len of at least 1, found samples={samples}, seq_len={seq_len}")
    name, data, rng = source_name(source), resolve(source, "calibration"), np.random.default_rng(seed)
    if isinstance(data, Text):
        # Twice what is needed: the rows are then a random half of each document, from more documents.
        data = _stream(data, _encoder(tokenizer, name), 2 * samples * seq_len, rng, name)
    rows = _rows(data, samples, seq_len, rng, name)
    summary = f"{name}: calibrating on {len(rows)} of {samples} rows of {seq_len} tokens, {rows.size} tokens in all"
    logging.getLogger("jgptq").info(summary)
    if len(rows) < FEW_SAMPLES:
        advice = f"with fewer than {FEW_SAMPLES} rows Hessians are poor estimates: ask for more, give more text or lower seq_len"
        warnings.warn(f"{summary}; {advice}", UserWarning, stacklevel=2)
    return rows


def evaluation_tokens(source: Source, tokenizer: Any = None) -> Int[np.ndarray, " T"]:
    """One stream of token ids to measure perplexity on.

    As in the GPTQ literature, the rows of text, including blank ones, are joined by a blank line (c4: by a space) and tokenized
    as one text with the tokenizer's defaults, so that special tokens are added once, at the beginning. For c4 these are the first
    1,100 documents of the split validation; the literature measures on their first 256 * 2048 tokens.

    Args:
      source: as for `calibration_tokens`, but of a dataset the split test is read, or validation where there is no test; rows of
        ids are concatenated.
      tokenizer: as for `calibration_tokens`.

    Returns:
      int32 `[T]`.

    Raises:
      CalibrationError: the source is unknown, missing, unreadable or without tokens, or there is no tokenizer.

    Example:
      >>> evaluation_tokens("wikitext", "Qwen/Qwen3-0.6B").ndim  # downloads the dataset
      1
    """
    name, data = source_name(source), resolve(source, "evaluation")
    if not isinstance(data, Text):
        return np.array(data, np.int32).reshape(-1)
    encode = _encoder(tokenizer, name)
    rows = _texts(data.read(), name)
    joined = data.joiner.join(rows)
    ids = np.asarray(encode([joined])[0] if joined.strip() else [], np.int32)
    if ids.size == 0:
        raise CalibrationError(f"{name}: no tokens at all; expected text, found {len(rows)} rows, all blank")
    return ids


def check_tokens(tokens: Int[Array, "..."], vocab_size: int, name: str) -> None:
    """Checks that every id is in a model's vocabulary.

    Args:
      tokens: integer ids of any shape.
      vocab_size: V.
      name: the name of the tokens in the error.

    Raises:
      CalibrationError: there are no tokens, or there are ids outside `[0, vocab_size)`.
    """
    ids = np.asarray(tokens)
    if ids.size == 0:
        raise CalibrationError(f"{name}: no tokens at all; expected token ids, found an array of shape {list(ids.shape)}")
    outside = int(np.count_nonzero((ids < 0) | (ids >= vocab_size)))
    if outside:
        raise CalibrationError(
            f"{name}: expected ids in [0, {vocab_size}), the model's vocabulary; found {outside} of {ids.size} outside it, ids"
            f" being {ids.min()} to {ids.max()}; is the tokenizer another model's? use the one in the model's own folder"
        )


def _encoder(tokenizer: Any, name: str) -> Callable[[list[str]], list[list[int]]]:
    """A function from texts to ids, with the tokenizer's default special tokens and without padding or truncation."""
    if tokenizer is None:
        raise CalibrationError(f"{name} is text: expected a tokenizer, found None; pass the model's folder, or token ids as .npy")
    if isinstance(tokenizer, str | Path):
        import transformers

        folder, advice = str(tokenizer), "pass a folder that holds a tokenizer.json and a tokenizer_config.json"
        load = transformers.AutoTokenizer.from_pretrained
        tokenizer = load_or_raise(f"tokenizer {folder!r}", advice, lambda: load(folder, trust_remote_code=False, use_fast=True))
    call: Callable[..., Any] = tokenizer
    if callable(tokenizer):
        return lambda texts: call(texts, verbose=False)["input_ids"]
    # A tokenizer of the `tokenizers` library returns an object that has the ids as an attribute.
    return lambda texts: [getattr(encoded, "ids", encoded) for encoded in map(tokenizer.encode, texts)]


def _texts(rows: Iterable[Any], name: str) -> list[str]:
    """The rows that are not null."""
    texts = [row for row in rows if row is not None]
    for row in texts:
        if not isinstance(row, str):
            raise CalibrationError(f"{name}: expected rows of text, found {type(row).__name__}; pass ids as one numpy array")
    return texts


def _stream(
    text: Text, encode: Callable[[list[str]], list[list[int]]], wanted: int, rng: np.random.Generator, name: str
) -> Int[np.ndarray, " T"]:
    """Ids of whole documents in random order: at least `wanted`, or all."""
    documents = text.read()
    if text.document_start is not None:
        documents = re.split(text.document_start, text.joiner.join(_texts(documents, name)))
    order = rng.permutation(len(documents))
    pieces: list[list[int]] = []
    total = 0
    while total < wanted and len(order):
        batch, order = order[:_BATCH], order[_BATCH:]
        texts = [document for document in _texts((documents[int(i)] for i in batch), name) if document.strip()]
        encoded = encode(texts) if texts else []
        pieces += encoded
        total += sum(map(len, encoded))
    if not total:
        raise CalibrationError(f"{name}: no tokens at all; expected text, found {len(documents)} documents, all blank")
    return np.fromiter(itertools.chain.from_iterable(pieces), np.int32, total)


def _rows(ids: np.ndarray, samples: int, seq_len: int, rng: np.random.Generator, name: str) -> Int[np.ndarray, "b S"]:
    length = ids.shape[-1]
    if length < seq_len:
        unit = "tokens" if ids.ndim == 1 else "tokens in a row"
        raise CalibrationError(f"{name}: expected at least seq_len={seq_len} {unit}, found {length}; lower seq_len or give more")
    if ids.ndim == 1:
        kept = min(length // seq_len, samples) * seq_len
        phase = int(rng.integers(min(length - kept, seq_len - 1) + 1))  # at most the surplus: no row is lost to it
        count = (length - phase) // seq_len
        ids = ids[phase : phase + count * seq_len].reshape(count, seq_len)
    return np.array(ids[rng.permutation(len(ids))[:samples], :seq_len], np.int32)
