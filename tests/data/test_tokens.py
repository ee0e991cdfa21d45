"""Calibration and evaluation tokens: sampling, tokenizers, and errors."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from texts import BOS, DOCUMENTS, assert_windows, few_rows, table
from tokenizers import Tokenizer

from jgptq.data.tokens import calibration_tokens, check_tokens, evaluation_tokens
from jgptq.errors import CalibrationError


@few_rows
@given(length=st.integers(1, 300), samples=st.integers(1, 40), seq_len=st.integers(1, 20), seed=st.integers(0, 2**32))
def test_rows_never_overlap_and_none_that_the_stream_holds_is_lost(length: int, samples: int, seq_len: int, seed: int):
    if length < seq_len:
        with pytest.raises(CalibrationError, match=f"at least seq_len={seq_len} tokens, found {length}"):
            calibration_tokens(np.arange(length), samples=samples, seq_len=seq_len, seed=seed)
        return
    rows = calibration_tokens(np.arange(length), samples=samples, seq_len=seq_len, seed=seed)
    assert rows.shape == (min(samples, length // seq_len), seq_len)
    assert_windows(rows, length)


def test_phase_and_order_of_the_rows_are_drawn_by_seed():
    draws = [calibration_tokens(np.arange(5000), samples=150, seq_len=16, seed=seed) for seed in range(8)]
    assert len({int(rows[0, 0]) % 16 for rows in draws}) > 2
    assert all((np.diff(rows[:, 0]) < 0).any() for rows in draws)


def test_one_seed_gives_one_result_and_another_seed_another(tokenizer: Any):
    first, again, other = (calibration_tokens(DOCUMENTS, tokenizer, 128, 16, seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("ids", [np.arange(9000), np.arange(9000).reshape(450, 20)], ids=["stream", "rows"])
def test_fewer_samples_of_ids_are_the_first_of_more(ids: np.ndarray):
    more = calibration_tokens(ids, samples=300, seq_len=16)
    np.testing.assert_array_equal(calibration_tokens(ids, samples=130, seq_len=16), more[:130])


def test_rows_of_ids_are_drawn_without_repetition_and_cut():
    ids = np.arange(400 * 10).reshape(400, 10)
    rows = calibration_tokens(ids, samples=200, seq_len=7)
    assert rows.shape == (200, 7)
    assert len(set(rows[:, 0])) == 200
    np.testing.assert_array_equal(rows[:, 0] % 10, 0)
    np.testing.assert_array_equal(np.diff(rows, axis=1), 1)


def test_rows_of_text_are_pieces_of_documents_laid_end_to_end(tokenizer: Any):
    rows = calibration_tokens(DOCUMENTS * 4, tokenizer, samples=128, seq_len=96)
    whole = {("<s>" + document).encode() for document in DOCUMENTS}
    seen = 0
    for row in rows:
        inner = tokenizer.decode(row).split("<s>")[1:-1]  # the first and the last piece may be cut
        seen += len(inner)
        assert {b"<s>" + piece.encode() for piece in inner} <= whole
    assert seen > 10


def test_every_document_begins_with_the_tokenizers_special_token(tokenizer: Any):
    rows = calibration_tokens(["abc"] * 200, tokenizer, samples=150, seq_len=4)
    assert (rows == BOS).sum() == 150


def test_tokenizing_stops_when_there_are_twice_the_tokens_asked_for(tokenizer: Any):
    texts: list[str] = []

    def counting(batch: list[str], **options: Any) -> Any:
        texts.extend(batch)
        return tokenizer(batch, **options)

    documents = [f"{i:09d}" for i in range(5000)]  # 10 tokens each
    calibration_tokens(documents, counting, samples=128, seq_len=25)
    assert 640 <= len(texts) < 640 + 64
    assert sorted(texts) != documents[: len(texts)], "the first documents were taken, not random ones"


def test_blank_and_null_documents_add_nothing(hub: Callable, tokenizer: Any):
    hub({"train": table(rows=["", "abc", None, " \n"] * 130)})
    rows = calibration_tokens("owner/name", tokenizer, samples=200, seq_len=4)
    assert len(rows) == 130
    assert len(np.unique(np.sort(rows, axis=1), axis=0)) == 1


def test_fewer_than_128_rows_come_with_a_warning_of_how_many():
    with pytest.warns(UserWarning, match=r"ids \[1000\]: calibrating on 100 of 128 rows of 10 tokens, 1000 tokens in all"):
        calibration_tokens(np.arange(1000), samples=128, seq_len=10)


def test_128_rows_come_without_a_warning(recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "jgptq"):
        assert len(calibration_tokens(np.arange(1280), samples=128, seq_len=10)) == 128
    assert not recwarn.list
    assert "128 of 128 rows of 10 tokens, 1280 tokens in all" in caplog.text


def test_a_tokenizer_may_be_a_folder_or_an_object_and_is_never_left_to_cut_or_pad(tokenizer_folder: Path, tokenizer: Any):
    plain = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    plain.no_truncation()
    plain.no_padding()
    ids = [BOS, *plain.encode("\n\n".join(DOCUMENTS), add_special_tokens=False).ids]
    for form in (tokenizer_folder, str(tokenizer_folder), tokenizer, plain):
        assert evaluation_tokens(DOCUMENTS, form).tolist() == ids
    draws = [calibration_tokens(DOCUMENTS, form, samples=128, seq_len=16) for form in (tokenizer_folder, tokenizer, plain)]
    np.testing.assert_array_equal(draws[0], draws[1])
    np.testing.assert_array_equal(draws[0], draws[2])


@pytest.mark.parametrize("function", [calibration_tokens, evaluation_tokens])
def test_text_without_a_tokenizer_is_refused_before_anything_is_fetched(function: Callable, hub: Callable):
    calls = hub(table())
    with pytest.raises(CalibrationError, match="wikitext is text: expected a tokenizer, found None"):
        function("wikitext")
    assert not calls


def test_a_tokenizer_that_cannot_be_loaded_is_named(tmp_path: Path):
    with pytest.raises(CalibrationError, match=r"tokenizer '.*' cannot be loaded") as caught:
        calibration_tokens(DOCUMENTS, tmp_path)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("documents", [[], ["", " \n"]])
@pytest.mark.parametrize("function", [calibration_tokens, evaluation_tokens])
def test_text_without_tokens_is_refused(function: Callable, documents: list[str], tokenizer: Any):
    with pytest.raises(CalibrationError, match="list of documents: no tokens at all"):
        function(documents, tokenizer)


def test_text_shorter_than_one_row_is_refused_with_both_lengths(tokenizer: Any):
    with pytest.raises(CalibrationError, match="at least seq_len=10 tokens, found 8"):
        calibration_tokens(["abc", "def"], tokenizer, samples=4, seq_len=10)


@pytest.mark.parametrize("documents", [[[1, 2], [3]], [b"bytes"], [{"text": "x"}]])
@pytest.mark.parametrize("function", [calibration_tokens, evaluation_tokens])
def test_documents_that_are_no_strings_are_refused(function: Callable, documents: list, tokenizer: Any):
    with pytest.raises(CalibrationError, match=f"expected rows of text, found {type(documents[0]).__name__}"):
        function(documents, tokenizer)


@pytest.mark.parametrize("sizes", [{"samples": 0}, {"seq_len": 0}, {"samples": -3}])
def test_sizes_below_one_are_refused(sizes: dict[str, int]):
    with pytest.raises(CalibrationError, match="samples and seq_len of at least 1"):
        calibration_tokens(np.arange(100), **sizes)


def test_ids_of_the_vocabulary_pass():
    check_tokens(np.array([[0, 31], [5, 6]], np.int32), 32, "ids")


@pytest.mark.parametrize(("ids", "outside"), [([0, 32, 40, 7], "2 of 4 .* 0 to 40"), ([-1, 5, 31], "1 of 3 .* -1 to 31")])
def test_ids_outside_the_vocabulary_are_counted(ids: list[int], outside: str):
    with pytest.raises(CalibrationError, match=rf"calib\.npy: .* in \[0, 32\).* found {outside}; is the tokenizer another"):
        check_tokens(np.array(ids, np.int32), 32, "calib.npy")


def test_no_ids_are_refused():
    with pytest.raises(CalibrationError, match="ids: no tokens at all"):
        check_tokens(np.zeros((0, 8), np.int32), 32, "ids")
