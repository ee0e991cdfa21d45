"""Sources of text and of token ids: named datasets, files, lists of texts, arrays. Nothing is tokenized here."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jgptq.errors import CalibrationError
from jgptq.notation import Array

Source = str | Path | Array | Sequence[str]
_FIELDS = ("text", "content")
_ENDINGS = (".txt", ".jsonl", ".parquet", ".npy")
Part = Literal["calibration", "evaluation"]
_SPLITS: dict[Part, tuple[str, str]] = {"calibration": ("train", "validation"), "evaluation": ("test", "validation")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """A public dataset under a short name; calibration and evaluation share no row of it."""

    path: str  # its name on the Hugging Face hub
    config: str | None = None  # its configuration; None where `data_files` name the files
    calibration: str = "train"  # the split to calibrate on, or a slice of it as `datasets` writes it
    evaluation: str = "test"  # the split to measure perplexity on, or a slice
    data_files: Mapping[str, str] = dataclasses.field(default_factory=dict)  # split -> the one file of it to download; empty: all
    field: str = "text"  # the column of text
    joiner: str = "\n\n"  # put between rows that are joined to one text
    document_start: str | None = None  # regex that splits the joined rows into documents; None: every row is a document


DATASETS: Mapping[str, Dataset] = {
    "wikitext": Dataset(path="Salesforce/wikitext", config="wikitext-2-raw-v1", document_start=r"(?m)^(?= = [^=\n].* = ?\n{4})"),
    "c4": Dataset(
        path="allenai/c4",
        evaluation="validation[:1100]",
        data_files={"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"},
        joiner=" ",
    ),
    "code": Dataset(
        path="codeparrot/codeparrot-clean-valid", calibration="train[:-512]", evaluation="train[-512:]", field="content"
    ),
    "medical": Dataset(
        path="ccdv/pubmed-summarization",
        evaluation="test[:256]",
        data_files={"train": "document/train-00000-of-00005.parquet", "test": "document/test-00000-of-00001.parquet"},
        field="article",
    ),
    "finance": Dataset(path="ashraq/financial-news-articles", calibration="train[:-1024]", evaluation="train[-1024:]"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """Rows of text that are fetched on demand, and how they are joined and split (as in `Dataset`)."""

    read: Callable[[], Sequence[Any]]  # fetches the rows; called after the tokenizer was loaded
    joiner: str = "\n\n"
    document_start: str | None = None


def source_name(source: Source) -> str:
    """The name of a source in messages."""
    if isinstance(source, str | Path):
        return str(source)
    return f"array of ids {list(source.shape)}" if isinstance(source, Array) else "list of documents"


def resolve(source: Source, part: Part) -> np.ndarray | Text:
    """Interprets a source by its name and type.

    Args:
      source: as for `jgptq.data.tokens.calibration_tokens`.
      part: what the tokens are for, which selects the split of a dataset.

    Returns:
      Checked integer ids, `[T]` or `[samples, S]`, or text that is not fetched yet.

    Raises:
      CalibrationError: an unknown source, or a file of ids that is missing, unreadable or does not hold ids.
    """
    if isinstance(source, Array):
        return _checked(np.asarray(source), source_name(source))
    if isinstance(source, Sequence) and not isinstance(source, str):
        return Text(read=lambda: source)
    if isinstance(source, str) and (dataset := DATASETS.get(source)):
        return Text(read=lambda: _dataset_rows(dataset, part), joiner=dataset.joiner, document_start=dataset.document_start)
    if isinstance(source, Path) or (isinstance(source, str) and (Path(source).suffix in _ENDINGS or Path(source).is_file())):
        return _resolve_file(Path(source))
    if isinstance(source, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(:.+)?", source):
        return Text(read=lambda: _hub_rows(source, part))
    raise CalibrationError(
        f"unknown source {source!r}; expected a named dataset ({', '.join(DATASETS)}), a dataset of the hub 'owner/name' or"
        f" 'owner/name:config', a path ending in {', '.join(_ENDINGS)}, a list of documents or an array of ids"
    )


def _resolve_file(path: Path) -> np.ndarray | Text:
    if path.suffix not in _ENDINGS or not path.is_file():
        actual = f"the ending {path.suffix!r}" if path.is_file() else "no such file"
        raise CalibrationError(f"{path}: expected a file ending in {', '.join(_ENDINGS)}, found {actual}; check the path")
    return _checked(_read(path), str(path)) if path.suffix == ".npy" else Text(read=lambda: _read(path))


def load_or_raise(what: str, advice: str, load: Callable[[], Any]) -> Any:
    """Calls `load` and turns any exception of it into a `CalibrationError`.

    Args:
      what: what is loaded, for the error.
      advice: what to try where it fails, for the error.
      load: loads it.

    Returns:
      What `load` returns.

    Raises:
      CalibrationError: loading failed; the cause is chained.
    """
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

    return load_or_raise(str(path), "write it anew, text as UTF-8 and ids as an integer array", load)


def _json_text(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{where}: expected one JSON object, found: {error}; write one object a line") from error
    return record[_text_column(record if isinstance(record, dict) else (), where)]


def _text_column(columns: Iterable[str], where: str) -> str:
    names = list(columns)
    for field in _FIELDS:
        if field in names:
            return field
    raise CalibrationError(f"{where}: expected a field {' or '.join(_FIELDS)}, found {names}; rename one or pass a list of texts")


def _dataset_rows(dataset: Dataset, part: Part) -> Sequence[Any]:
    split = dataset.calibration if part == "calibration" else dataset.evaluation
    options: dict[str, Any] = {"split": split}
    if dataset.data_files:
        base = split.partition("[")[0]
        # The dataset's card states the size of all files together, so that the check would refuse a single one.
        options |= {"data_files": {base: dataset.data_files[base]}, "verification_mode": "no_checks"}
    return _fetch(dataset.path, dataset.config, **options)[dataset.field]


def _hub_rows(source: str, part: Part) -> Sequence[Any]:
    path, _, config = source.partition(":")
    splits = _fetch(path, config or None)
    for split in _SPLITS[part]:
        if split in splits:
            return splits[split][_text_column(splits[split].column_names, source)]
    raise CalibrationError(f"{source}: expected a split {' or '.join(_SPLITS[part])}, found {list(splits)}; pass a list of texts")


def _fetch(path: str, config: str | None, **options: Any) -> Any:
    import datasets

    advice = f"check its name and the network, or pass a local file ending in {', '.join(_ENDINGS)}"
    return load_or_raise(f"dataset {path!r} (config {config!r})", advice, lambda: datasets.load_dataset(path, config, **options))


def _checked(ids: np.ndarray, name: str) -> np.ndarray:
    if not np.issubdtype(ids.dtype, np.integer) or ids.ndim not in (1, 2):
        raise CalibrationError(
            f"{name}: expected integer ids [T] or [samples, S], found {ids.dtype} {list(ids.shape)}; convert them"
        )
    if ids.size == 0:
        raise CalibrationError(f"{name}: no tokens at all; expected ids [T] or [samples, S], found {list(ids.shape)}")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= 2**31:
        raise CalibrationError(f"{name}: expected ids in [0, 2^31), found {low} to {high}; remove padding and masked ids")
    return ids
