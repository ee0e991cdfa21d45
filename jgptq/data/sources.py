"""Where tokens come from: datasets by name, files, lists of texts, arrays of ids. Nothing is tokenized here."""

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
    "wikitext": Preset(path="Salesforce/wikitext", config="wikitext-2-raw-v1", document_start=r"(?m)^(?= = [^=\n].* = ?\n{4})"),
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
class Text:
    """Text that is there to be read."""

    read: Callable[[], Sequence[Any]]  # fetches the rows; called when the tokenizer is known to load
    joiner: str = "\n\n"
    document_start: str | None = None


def source_name(source: Source) -> str:
    """What to call a source in a message."""
    if isinstance(source, str | Path):
        return str(source)
    return f"array of ids {list(source.shape)}" if isinstance(source, Array) else "list of documents"


def resolve(source: Source, part: Part) -> np.ndarray | Text:
    """What a source is, by its name and type; ids are read (and checked) at once, text is not."""
    if isinstance(source, Array):
        return _checked(np.asarray(source), source_name(source))
    if isinstance(source, Sequence) and not isinstance(source, str):
        return Text(read=lambda: source)
    if isinstance(source, str) and (preset := PRESETS.get(source)):
        return Text(read=lambda: _preset_rows(preset, part), joiner=preset.joiner, document_start=preset.document_start)
    if isinstance(source, Path) or (isinstance(source, str) and (Path(source).suffix in _ENDINGS or Path(source).is_file())):
        return _resolve_file(Path(source))
    if isinstance(source, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(:.+)?", source):
        return Text(read=lambda: _hub_rows(source, part))
    raise CalibrationError(
        f"unknown source {source!r}; expected a preset ({', '.join(PRESETS)}), a dataset 'owner/name' or 'owner/name:config', a"
        f" path ending in {', '.join(_ENDINGS)}, a list of documents or an array of ids"
    )


def _resolve_file(path: Path) -> np.ndarray | Text:
    if path.suffix not in _ENDINGS or not path.is_file():
        found = f"the ending {path.suffix!r}" if path.is_file() else "no such file"
        raise CalibrationError(f"{path}: expected a file ending in {', '.join(_ENDINGS)}, found {found}; convert or find it")
    return _checked(_read(path), str(path)) if path.suffix == ".npy" else Text(read=lambda: _read(path))


def loaded(what: str, advice: str, load: Callable[[], Any]) -> Any:
    """What `load` returns.

    Args:
      what: the thing that is loaded, for the error.
      advice: what to try when it cannot be.
      load: loads it.

    Raises:
      CalibrationError: it cannot be loaded; the cause is chained.
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

    return loaded(str(path), "write it anew, text as UTF-8 and ids as an integer array", load)


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


def _preset_rows(preset: Preset, part: Part) -> Sequence[Any]:
    split = preset.calibration if part == "calibration" else preset.evaluation
    options: dict[str, Any] = {"split": split}
    if preset.data_files:
        base = split.partition("[")[0]
        # The dataset's card has the size of all its files: checked against that, one file of them would be refused.
        options |= {"data_files": {base: preset.data_files[base]}, "verification_mode": "no_checks"}
    return _fetch(preset.path, preset.config, **options)[preset.field]


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
    return loaded(f"dataset {path!r} (config {config!r})", advice, lambda: datasets.load_dataset(path, config, **options))


def _checked(ids: np.ndarray, name: str) -> np.ndarray:
    if not np.issubdtype(ids.dtype, np.integer) or ids.ndim not in (1, 2):
        raise CalibrationError(f"{name}: expected integer ids [T] or [M, L], found {ids.dtype} {list(ids.shape)}; convert them")
    if ids.size == 0:
        raise CalibrationError(f"{name}: no tokens at all; expected ids [T] or [M, L], found {list(ids.shape)}")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= 2**31:
        raise CalibrationError(f"{name}: expected ids in [0, 2^31), found {low} to {high}; take out padding and masks")
    return ids
