"""Sources of texts and ids: files, arrays, and datasets by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from texts import BOS, DOCUMENTS, WIKITEXT, assert_windows, few_rows, table, write

from jgptq.data.sources import DATASETS, Dataset
from jgptq.data.tokens import calibration_tokens, evaluation_tokens
from jgptq.errors import CalibrationError


@pytest.mark.parametrize("dtype", [np.uint16, np.int64])
def test_npy_is_read_as_the_array_it_holds(tmp_path: Path, dtype: type):
    ids = np.arange(3000).astype(dtype)
    np.save(tmp_path / "ids.npy", ids)
    from_file = calibration_tokens(tmp_path / "ids.npy", samples=150, seq_len=16)
    assert type(from_file) is np.ndarray
    assert_windows(from_file, 3000)
    np.testing.assert_array_equal(from_file, calibration_tokens(ids, samples=150, seq_len=16))


@pytest.mark.parametrize("shape", [(60,), (4, 15)])
def test_evaluation_ids_are_one_stream_in_their_order(tmp_path: Path, shape: tuple[int, ...]):
    np.save(tmp_path / "ids.npy", np.arange(60, dtype=np.uint16).reshape(shape))
    stream = evaluation_tokens(str(tmp_path / "ids.npy"))
    assert stream.dtype == np.int32
    np.testing.assert_array_equal(stream, np.arange(60))


def test_npy_rows_shorter_than_seq_len_are_refused(tmp_path: Path):
    np.save(tmp_path / "ids.npy", np.zeros((300, 9), np.int32))
    with pytest.raises(CalibrationError, match=r"ids\.npy: expected at least seq_len=10 tokens in a row, found 9"):
        calibration_tokens(tmp_path / "ids.npy", samples=128, seq_len=10)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.zeros(4000, np.float32), r"integer ids .*found float32 \[4000\]"),
        (np.zeros(4000, bool), r"integer ids .*found bool"),
        (np.zeros((2, 3, 4000), np.int32), r"\[T\] or \[samples, S\], found int32 \[2, 3, 4000\]"),
        (np.array(7, np.int32), r"\[T\] or \[samples, S\], found int32 \[\]"),
        (np.zeros(0, np.int32), r"no tokens at all"),
        (np.array([5, -100, 7]), r"found -100 to 7"),
        (np.array([5, 2**31]), r"found 5 to 2147483648"),
    ],
    ids=["float", "bool", "3-D", "0-D", "empty", "negative", "too large"],
)
@pytest.mark.parametrize("function", [calibration_tokens, evaluation_tokens])
def test_arrays_that_are_no_ids_are_refused(function: Callable, ids: np.ndarray, message: str, tmp_path: Path):
    np.save(tmp_path / "ids.npy", ids)
    for source in (np.asarray(ids), tmp_path / "ids.npy"):
        with pytest.raises(CalibrationError, match=message):
            function(source)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"not an array"])
def test_files_that_are_no_npy_are_refused_by_name(tmp_path: Path, content: bytes):
    (tmp_path / "ids.npy").write_bytes(content)
    with pytest.raises(CalibrationError, match=r"ids\.npy cannot be loaded") as caught:
        calibration_tokens(tmp_path / "ids.npy")
    assert caught.value.__cause__ is not None


def test_npy_with_pickled_objects_is_refused_without_unpickling(tmp_path: Path):
    class Trap:
        def __reduce__(self) -> tuple:
            return (tmp_path / "sprung").touch, ()

    np.save(tmp_path / "ids.npy", np.array([Trap()], object), allow_pickle=True)
    with pytest.raises(CalibrationError, match=r"ids\.npy"):
        calibration_tokens(tmp_path / "ids.npy")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_files_of_documents_give_what_the_list_of_them_gives(tmp_path: Path, tokenizer: Any, name: str):
    documents = [*DOCUMENTS, "a line separator \u2028 inside", "naïve, 量子化"]
    path = write(tmp_path / name, documents)
    expected = calibration_tokens(documents, tokenizer, samples=128, seq_len=16)
    np.testing.assert_array_equal(calibration_tokens(str(path), tokenizer, samples=128, seq_len=16), expected)
    np.testing.assert_array_equal(evaluation_tokens(path, tokenizer), evaluation_tokens(documents, tokenizer))


def test_txt_is_one_document(tmp_path: Path, tokenizer: Any):
    text = "\n\n".join(DOCUMENTS)
    path = write(tmp_path / "rows.txt", DOCUMENTS)
    ids = [BOS, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert evaluation_tokens(path, tokenizer).tolist() == ids
    rows = calibration_tokens(path, tokenizer, samples=128, seq_len=16)
    assert (rows == BOS).sum() <= 1
    assert all(tokenizer.decode(row, skip_special_tokens=True) in text for row in rows)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'text': 1}", r"rows\.jsonl, line 3: expected one JSON object, found: Expecting property name"),
        ('{"body": "x"}', r"rows\.jsonl, line 3: expected a field text or content, found \['body'\]"),
        ("[1, 2]", r"rows\.jsonl, line 3: expected a field text or content"),
        ('{"text": [1]}', r"rows\.jsonl: expected rows of text, found list"),
    ],
)
def test_jsonl_lines_that_hold_no_text_are_refused(tmp_path: Path, tokenizer: Any, line: str, message: str):
    (tmp_path / "rows.jsonl").write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(CalibrationError, match=message):
        calibration_tokens(tmp_path / "rows.jsonl", tokenizer)


def test_parquet_without_a_text_column_is_refused_with_the_columns_it_has(tmp_path: Path, tokenizer: Any):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "id": [1]}), tmp_path / "rows.parquet")
    with pytest.raises(CalibrationError, match=r"rows\.parquet: expected a field text or content, found \['body', 'id'\]"):
        evaluation_tokens(tmp_path / "rows.parquet", tokenizer)


@pytest.mark.parametrize("name", ["rows.parquet", "rows.txt", "rows.jsonl"])
def test_files_that_cannot_be_read_are_refused_by_name(tmp_path: Path, tokenizer: Any, name: str):
    (tmp_path / name).write_bytes(b"\xff\xfe\x00\xff")
    with pytest.raises(CalibrationError, match=f"{name} cannot be loaded"):
        calibration_tokens(tmp_path / name, tokenizer)


def test_missing_files_and_unknown_endings_are_refused(tmp_path: Path, tokenizer: Any, hub: Callable):
    calls = hub(AssertionError("a path was taken for the name of a dataset"))
    (tmp_path / "rows.csv").write_text("text\nx\n")
    missing = "no such file"
    for source, reason in [("none/rows.txt", missing), (tmp_path / "none", missing), (tmp_path / "rows.csv", "'.csv'")]:
        with pytest.raises(CalibrationError, match=rf"ending in \.txt, \.jsonl, \.parquet, \.npy, found .*{reason}"):
            calibration_tokens(source, tokenizer)
    assert not calls


C4 = "en/c4-{}.json.gz"


PUBMED = "document/{}.parquet"


LOADS: dict[str, tuple[tuple, dict, dict]] = {
    "wikitext": (("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "train"}, {"split": "test"}),
    "c4": (
        ("allenai/c4", None),
        {"split": "train", "data_files": {"train": C4.format("train.00000-of-01024")}, "verification_mode": "no_checks"},
        {
            "split": "validation[:1100]",
            "data_files": {"validation": C4.format("validation.00000-of-00008")},
            "verification_mode": "no_checks",
        },
    ),
    "code": (("codeparrot/codeparrot-clean-valid", None), {"split": "train[:-512]"}, {"split": "train[-512:]"}),
    "medical": (
        ("ccdv/pubmed-summarization", None),
        {"split": "train", "data_files": {"train": PUBMED.format("train-00000-of-00005")}, "verification_mode": "no_checks"},
        {"split": "test[:256]", "data_files": {"test": PUBMED.format("test-00000-of-00001")}, "verification_mode": "no_checks"},
    ),
    "finance": (("ashraq/financial-news-articles", None), {"split": "train[:-1024]"}, {"split": "train[-1024:]"}),
}


def test_every_named_dataset_is_tested():
    assert set(LOADS) == set(DATASETS)


@pytest.mark.parametrize("name", LOADS)
def test_named_datasets_load_exactly_their_split_and_files(name: str, hub: Callable, tokenizer_folder: Path):
    args, calibration, evaluation = LOADS[name]
    calls = hub(table(DATASETS[name].field))
    assert calibration_tokens(name, tokenizer_folder, samples=128, seq_len=16).shape == (128, 16)
    assert evaluation_tokens(name, tokenizer_folder).size > 1000
    assert calls == [(args, calibration), (args, evaluation)]


def test_a_named_datasets_one_file_and_slice_are_what_datasets_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any
):
    for name in ("train-0", "train-1", "validation-0"):
        write(tmp_path / f"{name}.jsonl", [f"{name} {i}" for i in range(10)])
    data_files = {"train": "train-0.jsonl", "validation": "validation-0.jsonl"}
    dataset = Dataset(path=str(tmp_path), evaluation="validation[:2]", data_files=data_files, joiner=" ")
    monkeypatch.setattr("jgptq.data.sources.DATASETS", {"local": dataset})
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    assert tokenizer.decode(evaluation_tokens("local", tokenizer)) == "<s>validation-0 0 validation-0 1"
    with pytest.warns(UserWarning, match="10 of 10 rows"):
        rows = calibration_tokens("local", tokenizer, samples=10, seq_len=10)
    assert sorted(tokenizer.batch_decode(rows)) == [f"<s>train-0 {i}" for i in range(10)]


def test_wikitext_is_joined_by_blank_lines_and_tokenized_as_one_text_to_evaluate(hub: Callable, tokenizer: Any):
    rows = ["", " = A = \n", "", " A is a letter . \n"]
    hub(table(rows=rows))
    stream = evaluation_tokens("wikitext", tokenizer)
    assert tokenizer.decode(stream) == "<s>" + "\n\n".join(rows)
    assert (stream == BOS).sum() == 1


def test_c4_is_joined_by_spaces_to_evaluate(hub: Callable, tokenizer: Any):
    hub(table(rows=["one", "two"]))
    assert tokenizer.decode(evaluation_tokens("c4", tokenizer)) == "<s>one two"


@few_rows
def test_wikitext_articles_are_the_documents_to_calibrate_on(hub: Callable, tokenizer: Any):
    articles = [["", f" = Title {i} = \n", "", " = = Section = = \n", "", f" Text of {i} = 1 . \n"] for i in range(100)]
    hub(table(rows=[row for article in articles for row in article]))
    stream = tokenizer.decode(calibration_tokens("wikitext", tokenizer, samples=1, seq_len=3000)[0])
    whole = stream.split("<s>")[1:-1]
    assert len(whole) > 20
    for text in whole:
        number = text.removeprefix(" = Title ").split()[0]
        # The blank row before the next title belongs to this document, with its joiner.
        expected = "\n\n".join(articles[int(number)][1:]) + ("\n\n" * 2 if number != "99" else "")
        assert text == expected


@pytest.mark.parametrize("column", ["text", "content"])
@pytest.mark.parametrize(("name", "args"), [("owner/na-me.2", ("owner/na-me.2", None)), ("o/n:a.b", ("o/n", "a.b"))])
def test_any_dataset_is_loaded_by_its_name(hub: Callable, tokenizer: Any, name: str, args: tuple, column: str):
    calls = hub({"train": table(column), "validation": table(column, ["never"]), "test": table(column, ["a", "b"])})
    expected = calibration_tokens(DOCUMENTS, tokenizer, samples=128, seq_len=16)
    np.testing.assert_array_equal(calibration_tokens(name, tokenizer, samples=128, seq_len=16), expected)
    assert tokenizer.decode(evaluation_tokens(name, tokenizer)) == "<s>a\n\nb"
    assert calls == [(args, {})] * 2


def test_validation_stands_in_for_a_split_that_a_dataset_does_not_have(hub: Callable, tokenizer: Any):
    hub({"validation": table()})
    expected = calibration_tokens(DOCUMENTS, tokenizer, samples=128, seq_len=16)
    np.testing.assert_array_equal(calibration_tokens("owner/name", tokenizer, samples=128, seq_len=16), expected)
    np.testing.assert_array_equal(evaluation_tokens("owner/name", tokenizer), evaluation_tokens(DOCUMENTS, tokenizer))


def test_perplexity_is_never_measured_on_a_training_split(hub: Callable, tokenizer: Any):
    hub({"train": table()})
    with pytest.raises(CalibrationError, match=r"owner/name: expected a split test or validation, found \['train'\]"):
        evaluation_tokens("owner/name", tokenizer)


def test_datasets_without_a_text_column_are_refused_with_the_columns_they_have(hub: Callable, tokenizer: Any):
    hub({"train": table("question")})
    with pytest.raises(CalibrationError, match=r"owner/name: expected a field .*found \['title', 'question'\]"):
        calibration_tokens("owner/name", tokenizer)


@pytest.mark.parametrize(("source", "name"), [("wikitext", "Salesforce/wikitext"), ("owner/name:part", "owner/name")])
def test_datasets_that_cannot_be_fetched_are_named_with_the_cause(hub: Callable, tokenizer: Any, source: str, name: str):
    cause = ConnectionError("no route")
    hub(cause)
    with pytest.raises(CalibrationError, match=f"'{name}'.*ConnectionError: no route.*local file") as caught:
        calibration_tokens(source, tokenizer)
    assert caught.value.__cause__ is cause


@pytest.mark.parametrize("source", ["wikitxt", "a/b/c", "./rows.csv", 7])
def test_unknown_sources_are_refused_with_the_named_datasets(source: Any, tokenizer: Any):
    with pytest.raises(CalibrationError, match=f"unknown source {source!r}; .*{', '.join(DATASETS)}"):
        calibration_tokens(source, tokenizer)


@pytest.mark.skipif(not WIKITEXT.is_dir(), reason=f"{WIKITEXT} is absent")
def test_wikitext_from_files_keeps_its_text(tmp_path: Path, tokenizer: Any):
    text = (WIKITEXT / "wiki.test.raw").read_text(encoding="utf-8")[:100_000]
    (tmp_path / "test.txt").write_text(text, encoding="utf-8")
    assert tokenizer.decode(evaluation_tokens(tmp_path / "test.txt", tokenizer)) == "<s>" + text


@pytest.mark.skipif(not WIKITEXT.is_dir(), reason=f"{WIKITEXT} is absent")
def test_wikitext_titles_split_real_articles_only(hub: Callable):
    text = (WIKITEXT / "wiki.test.raw").read_text(encoding="utf-8")
    texts: list[str] = []

    def recording(batch: list[str], **options: Any) -> Any:
        texts.extend(batch)
        return {"input_ids": [[1] * 128 for _ in batch]}

    hub(table(rows=[f"{line}\n" if line.strip() else "" for line in text.splitlines()]))  # the rows of the dataset
    with pytest.warns(UserWarning, match=r"60 of 100 rows"):
        calibration_tokens("wikitext", recording, samples=100, seq_len=128)
    assert len(texts) == 60  # as the dataset's paper has it
    assert sum(map(len, map(str.split, texts))) == len(text.split())
    assert min(map(len, texts)) > 1500
