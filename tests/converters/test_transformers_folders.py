"""Folders that transformers wrote, of every row of every family."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from twins import ROWS, logits, logits_of, twin

from converters import load_hf, save_hf
from converters.checkpoint import SINGLE
from jgptq.errors import CheckpointError
from jgptq.models import config_from_hf


@pytest.mark.parametrize("row", ROWS)
def test_a_folder_of_transformers_is_read_and_written_back_tensor_for_tensor(tmp_path: Path, row: str):
    twin(row).save_pretrained(tmp_path / "theirs")
    loaded = load_hf(tmp_path / "theirs")
    theirs = safetensors.numpy.load_file(tmp_path / "theirs" / SINGLE)
    ours = safetensors.numpy.load_file(save_hf(loaded, tmp_path / "ours", format="float") / SINGLE)
    np.testing.assert_array_equal(logits(loaded), logits_of(row))
    assert loaded.config == config_from_hf(ROWS[row][0])
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert ours[name].dtype == array.dtype
        np.testing.assert_array_equal(ours[name], array)


def test_constants_that_old_files_of_a_family_hold_are_passed_over(tmp_path: Path):
    twin("gptj").save_pretrained(tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / SINGLE)
    masks = {"transformer.h.0.attn.bias": np.ones((1, 1, 64, 64), bool), "transformer.h.1.attn.masked_bias": np.float32([-1e9])}
    safetensors.numpy.save_file(tensors | masks, tmp_path / SINGLE)
    load_hf(tmp_path)
    safetensors.numpy.save_file(tensors | {"transformer.h.0.attn.q_proj.bias": np.zeros(64, np.float32)}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=r"transformer\.h\.0\.attn\.q_proj\.bias is none of a gptj"):
        load_hf(tmp_path)
