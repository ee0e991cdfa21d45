"""Tokens to calibrate on and to measure perplexity on: from datasets, files, texts or arrays of ids."""

import itertools
import logging
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jgptq.data.sources import Source, Text, loaded, resolve, source_name
from jgptq.errors import CalibrationError
from jgptq.notation import Array, Int

FEW_SAMPLES = 128  # fewer rows than this estimate a Hessian poorly
_BATCH = 64  # documents tokenized at a time


def calibration_tokens(
    source: Source, tokenizer: Any = None, samples: int = 512, seq_len: int = 2048, seed: int = 0
) -> Int[np.ndarray, "b S"]:
    """Rows of token ids to calibrate on, drawn by seed.

    Documents are tokenized one by one, with whatever special tokens the tokenizer adds by default, in an order drawn by `seed`
    until there are twice the tokens asked for, and concatenated to one stream. The rows are windows of it, without overlap, at a
    random phase, in random order. Ids given as `[T]` are such a stream; of ids given as `[M, L]` random rows are cut to
    `seq_len`.

    Args:
      source: the name of a preset (`PRESETS`); a dataset "owner/name" or "owner/name:config" with a column text or content, of
        which the split train, else validation, is read (all are downloaded); a path: .txt (one document), .jsonl or .parquet (a
        field text or content), .npy (ids); a list of documents; or integer ids `[T]` or `[M, L]`, L >= seq_len.
      tokenizer: folder or hub id of a tokenizer, or an object that is called, or else has `encode`, like one of transformers; not
        needed for ids.
      samples: rows wanted.
      seq_len: tokens in a row.
      seed: of all random choices.

    Returns:
      int32 `[samples, seq_len]`, or as many rows as there are; fewer than 128 come with a UserWarning.

    Raises:
      CalibrationError: the source is unknown, missing, unreadable, empty or shorter than a row, or there is no tokenizer.
    """
    if samples < 1 or seq_len < 1:
        raise CalibrationError(f"expected samples and seq_len of at least 1, found samples={samples}, seq_len={seq_len}")
    name, found, rng = source_name(source), resolve(source, "calibration"), np.random.default_rng(seed)
    if isinstance(found, Text):
        # Twice what is needed: the rows are then a random half, and not the whole, of each document.
        found = _stream(found, _encoder(tokenizer, name), 2 * samples * seq_len, rng, name)
    rows = _rows(found, samples, seq_len, rng, name)
    summary = f"{name}: calibrating on {len(rows)} of {samples} rows of {seq_len} tokens, {rows.size} tokens in all"
    logging.getLogger("jgptq").info(summary)
    if len(rows) < FEW_SAMPLES:
        advice = f"with fewer than {FEW_SAMPLES} rows Hessians are poor estimates: ask for more, give more text or lower seq_len"
        warnings.warn(f"{summary}; {advice}", UserWarning, stacklevel=2)
    return rows


def evaluation_tokens(source: Source, tokenizer: Any = None) -> Int[np.ndarray, " T"]:
    """One stream of token ids to measure perplexity on.

    As in the GPTQ literature, the rows of text, blank ones too, are joined by a blank line (c4: by a space) and tokenized as one
    text with the tokenizer's defaults: special tokens stand once, where the text begins. Of c4 these are the first 1,100
    documents of the split validation; the literature measures on their first 256 * 2048 tokens.

    Args:
      source: as for `calibration_tokens`, but of a dataset the split test, else validation; rows of ids are put end to end.
      tokenizer: as for `calibration_tokens`.

    Returns:
      int32 `[T]`.

    Raises:
      CalibrationError: the source is unknown, missing, unreadable or without tokens, or there is no tokenizer.
    """
    name, found = source_name(source), resolve(source, "evaluation")
    if not isinstance(found, Text):
        return np.array(found, np.int32).reshape(-1)
    encode = _encoder(tokenizer, name)
    rows = _texts(found.read(), name)
    joined = found.joiner.join(rows)
    ids = np.asarray(encode([joined])[0] if joined.strip() else [], np.int32)
    if ids.size == 0:
        raise CalibrationError(f"{name}: no tokens at all; expected text, found {len(rows)} rows, all blank")
    return ids


def check_tokens(tokens: Int[Array, "..."], vocab_size: int, name: str) -> None:
    """Checks that every id is in a model's vocabulary.

    Args:
      tokens: integer ids of any shape.
      vocab_size: V.
      name: what to call the tokens in the error.

    Raises:
      CalibrationError: there are no tokens, or ids outside `[0, vocab_size)`.
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
    """A function from texts to their ids, with the tokenizer's defaults: special tokens as it has them, no padding, no cut."""
    if tokenizer is None:
        raise CalibrationError(f"{name} is text: expected a tokenizer, found None; pass the model's folder, or token ids as .npy")
    if isinstance(tokenizer, str | Path):
        import transformers

        folder, advice = str(tokenizer), "pass a folder that holds a tokenizer.json and a tokenizer_config.json"
        load = transformers.AutoTokenizer.from_pretrained
        tokenizer = loaded(f"tokenizer {folder!r}", advice, lambda: load(folder, trust_remote_code=False, use_fast=True))
    call: Callable[..., Any] = tokenizer
    if callable(tokenizer):
        return lambda texts: call(texts, verbose=False)["input_ids"]
    # A tokenizer of the `tokenizers` library encodes to an object that has the ids.
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
    """Ids of whole documents in random order, at least `wanted` or all there are."""
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
        phase = int(rng.integers(min(length - kept, seq_len - 1) + 1))  # never costs a row that was asked for
        count = (length - phase) // seq_len
        ids = ids[phase : phase + count * seq_len].reshape(count, seq_len)
    return np.array(ids[rng.permutation(len(ids))[:samples], :seq_len], np.int32)
