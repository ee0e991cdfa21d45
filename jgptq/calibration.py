"""Tokens to calibrate on and to measure perplexity on: from datasets, files, texts or arrays of ids."""

import dataclasses
import itertools
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jgptq.errors import CalibrationError
from jgptq.notation import Array, Int

Source = str | Path | Array | Sequence[str]

FEW_SAMPLES = 128  # fewer rows than this estimate a Hessian poorly
_FIELDS = ("text", "content")
_ENDINGS = (".txt", ".jsonl", ".parquet", ".npy")
_BATCH = 64  # documents tokenized at a time
_Part = Literal["calibration", "evaluation"]
_SPLITS: dict[_Part, tuple[str, str]] = {"calibration": ("train", "validation"), "evaluation": ("test", "validation")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """A public dataset under a short name; no row of it is both calibrated and evaluated on."""

    path: str  # its name on the Hugging Face hub
    config: str | None = None  # the configuration; None with `data_files`, which name its files themselves
    calibration: str = "train"  # the split to calibrate on, or a slice of it as `datasets` writes it
    evaluation: str = "test"  # the split to measure perplexity on, or a slice
    data_files: Mapping[str, str] = dataclasses.field(default_factory=dict)  # split -> the one file of it to fetch; empty: all
    field: str = "text"  # the column of text
    joiner: str = "\n\n"  # between rows that are joined to one text
    document_start: str | None = None  # splits the joined rows into documents; None: every row is one


PRESETS: Mapping[str, Preset] = {
    "wikitext": Preset(path="Salesforce/wikitext", config="wikitext-2-raw-v1", document_start=r"(?m)^(?= = [^=\n].* = ?$)"),
    "c4": Preset(
        path="allenai/c4",
        evaluation="validation[:1100]",
        data_files={"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"},
        joiner=" ",
    ),
    "code": Preset(
        path="codeparrot/codeparrot-clean-valid", calibration="train[:-512]", evaluation="train[-512:]", field="content"
    ),
    "medical": Preset(
        path="ccdv/pubmed-summarization",
        evaluation="test[:256]",
        data_files={"train": "document/train-00000-of-00005.parquet", "test": "document/test-00000-of-00001.parquet"},
        field="article",
    ),
    "finance": Preset(path="ashraq/financial-news-articles", calibration="train[:-1024]", evaluation="train[-1024:]"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Text:
    read: Callable[[], Sequence[Any]]  # fetches the rows; called when the tokenizer is known to load
    joiner: str = "\n\n"
    document_start: str | None = None


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
    name, found, rng = _name(source), _resolve(source, "calibration"), np.random.default_rng(seed)
    if isinstance(found, _Text):
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
    name, found = _name(source), _resolve(source, "evaluation")
    if not isinstance(found, _Text):
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


def _name(source: Source) -> str:
    if isinstance(source, str | Path):
        return str(source)
    return f"array of ids {list(source.shape)}" if isinstance(source, Array) else "list of documents"


def _resolve(source: Source, part: _Part) -> np.ndarray | _Text:
    """What a source is, by its name and type; ids are read (and checked) at once, text is not."""
    if isinstance(source, Array):
        return _checked(np.asarray(source), _name(source))
    if isinstance(source, Sequence) and not isinstance(source, str):
        return _Text(read=lambda: source)
    if isinstance(source, str) and (preset := PRESETS.get(source)):
        return _Text(read=lambda: _preset_rows(preset, part), joiner=preset.joiner, document_start=preset.document_start)
    if isinstance(source, Path) or (isinstance(source, str) and (Path(source).suffix in _ENDINGS or Path(source).is_file())):
        return _resolve_file(Path(source))
    if isinstance(source, str) and re.fullmatch(r"[\w.-]+/[\w.-]+(:.+)?", source):
        return _Text(read=lambda: _hub_rows(source, part))
    raise CalibrationError(
        f"unknown source {source!r}; expected a preset ({', '.join(PRESETS)}), a dataset 'owner/name' or 'owner/name:config', a"
        f" path ending in {', '.join(_ENDINGS)}, a list of documents or an array of ids"
    )


def _resolve_file(path: Path) -> np.ndarray | _Text:
    if path.suffix not in _ENDINGS or not path.is_file():
        found = f"the ending {path.suffix!r}" if path.is_file() else "no such file"
        raise CalibrationError(f"{path}: expected a file ending in {', '.join(_ENDINGS)}, found {found}; check the path")
    return _checked(_read(path), str(path)) if path.suffix == ".npy" else _Text(read=lambda: _read(path))


def _loaded(what: str, advice: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except CalibrationError:
        raise
    except Exception as error:  # the hub, the network and the file formats raise dozens of unrelated types
        raise CalibrationError(f"{what} cannot be loaded: {type(error).__name__}: {error}; {advice}") from error


def _read(path: Path) -> Any:
    def load() -> Any:
        if path.suffix == ".npy":
            return np.lib.format.open_memmap(path, mode="r")  # unlike np.load it never unpickles
        if path.suffix == ".txt":
            return [path.read_text(encoding="utf-8")]
        if path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:  # not splitlines(): it splits at U+2028, which JSON strings may hold
                return [_json_text(line, f"{path}, line {n}") for n, line in enumerate(lines, start=1) if line.strip()]
        import pyarrow.parquet

        column = _text_column(pyarrow.parquet.read_schema(path).names, str(path))
        return pyarrow.parquet.read_table(path, columns=[column]).column(column).to_pylist()

    return _loaded(str(path), "write it anew, text as UTF-8 and ids as an integer array", load)


def _json_text(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{where}: expected one JSON object, found: {error}; write one object a line") from error
    return record[_text_column(record if isinstance(record, dict) else (), where)]


def _text_column(columns: Iterable[str], where: str) -> str:
    found = list(columns)
    for field in _FIELDS:
        if field in found:
            return field
    raise CalibrationError(f"{where}: expected a field {' or '.join(_FIELDS)}, found {found}; rename one or pass a list of texts")


def _preset_rows(preset: Preset, part: _Part) -> Sequence[Any]:
    split = preset.calibration if part == "calibration" else preset.evaluation
    options: dict[str, Any] = {"split": split}
    if preset.data_files:
        base = split.partition("[")[0]
        # The dataset's card has the size of all its files: checked against that, one file of them would be refused.
        options |= {"data_files": {base: preset.data_files[base]}, "verification_mode": "no_checks"}
    return _fetch(preset.path, preset.config, **options)[preset.field]


def _hub_rows(source: str, part: _Part) -> Sequence[Any]:
    path, _, config = source.partition(":")
    splits = _fetch(path, config or None)
    for split in _SPLITS[part]:
        if split in splits:
            return splits[split][_text_column(splits[split].column_names, source)]
    raise CalibrationError(f"{source}: expected a split {' or '.join(_SPLITS[part])}, found {list(splits)}; pass a list of texts")


def _fetch(path: str, config: str | None, **options: Any) -> Any:
    import datasets

    advice = f"check its name and the network, or pass a local file ending in {', '.join(_ENDINGS)}"
    return _loaded(f"dataset {path!r} (config {config!r})", advice, lambda: datasets.load_dataset(path, config, **options))


def _encoder(tokenizer: Any, name: str) -> Callable[[list[str]], list[list[int]]]:
    """A function from texts to their ids: special tokens as the tokenizer has them, nothing padded, nothing cut."""
    if tokenizer is None:
        raise CalibrationError(f"{name} is text: expected a tokenizer, found None; pass the model's folder, or token ids as .npy")
    if isinstance(tokenizer, str | Path):
        import transformers

        folder, advice = str(tokenizer), "pass a folder that holds a tokenizer.json and a tokenizer_config.json"
        load = transformers.AutoTokenizer.from_pretrained
        tokenizer = _loaded(f"tokenizer {folder!r}", advice, lambda: load(folder, trust_remote_code=False, use_fast=True))
    call: Callable[..., Any] = tokenizer
    if callable(tokenizer):
        return lambda texts: call(texts, padding=False, truncation=False, verbose=False)["input_ids"]
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
    text: _Text, encode: Callable[[list[str]], list[list[int]]], wanted: int, rng: np.random.Generator, name: str
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


def _checked(ids: np.ndarray, name: str) -> np.ndarray:
    if not np.issubdtype(ids.dtype, np.integer) or ids.ndim not in (1, 2):
        raise CalibrationError(f"{name}: expected integer ids [T] or [M, L], found {ids.dtype} {list(ids.shape)}; convert them")
    if ids.size == 0:
        raise CalibrationError(f"{name}: no tokens at all; expected ids [T] or [M, L], found {list(ids.shape)}")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= 2**31:
        raise CalibrationError(f"{name}: expected ids in [0, 2^31), found {low} to {high}; take out padding and masks")
    return ids


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
