"""Texts, and a tokenizer of bytes for them: what tests of calibration tokens and of their sources run on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer

BOS = 0
WIKITEXT = Path("../shared/data/wikitext2")
DOCUMENTS = [f"Document {i}: " + "many words of it. " * (i % 7) for i in range(120)]
few_rows = pytest.mark.filterwarnings("ignore:.*with fewer than 128 rows:UserWarning")


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of bytes that begins every text with <s>, and that would cut it at 16 tokens and pad it where asked."""
    folder = tmp_path_factory.mktemp("tokenizer")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={"<s>": BOS} | {byte: i + 1 for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=64, pad_token="<s>")
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "pad_token": "<s>", "model_max_length": 16}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list]:
    """`hub(answer)` makes every dataset `answer` (or raises it) and gives the list that the arguments will be recorded in."""
    calls = []

    def install(answer: Any) -> list:
        def load_dataset(*args: Any, **kwargs: Any) -> Any:
            calls.append((args, kwargs))
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return install


def table(column: str = "text", rows: list | None = None) -> datasets.Dataset:
    rows = DOCUMENTS if rows is None else rows
    return datasets.Dataset.from_dict({"title": ["no"] * len(rows), column: rows})


def write(path: Path, rows: list[str]) -> Path:
    """The rows as a file of the kind that its ending says."""
    if path.suffix == ".jsonl":
        lines = (json.dumps({"id": 1, "text": row}, ensure_ascii=False) for row in rows)
        path.write_text("\n\n".join(lines), encoding="utf-8")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"id": [1] * len(rows), "content": rows}), path)
    else:
        path.write_text("\n\n".join(rows), encoding="utf-8")
    return path


def assert_windows(rows: np.ndarray, length: int) -> None:
    """Of `np.arange(length)`: every row is contiguous, all have one phase, and no two are the same."""
    seq_len = rows.shape[1]
    assert rows.dtype == np.int32
    assert rows.min() >= 0
    assert rows.max() < length
    np.testing.assert_array_equal(np.diff(rows, axis=1), 1)
    assert len(set(rows[:, 0] % seq_len)) == 1
    assert len(set(rows[:, 0])) == len(rows)
