"""Folders that transformers wrote, of every row of every family."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from twins import ROWS, twin

from converters import load_hf, save_hf
from converters.checkpoint import SINGLE
from jgptq.models import config_from_hf


@pytest.mark.parametrize("row", ROWS)
def test_a_folder_of_transformers_is_read_and_written_back_tensor_for_tensor(tmp_path: Path, row: str):
    twin(row).save_pretrained(tmp_path / "theirs")
    loaded = load_hf(tmp_path / "theirs")
    theirs = safetensors.numpy.load_file(tmp_path / "theirs" / SINGLE)
    ours = safetensors.numpy.load_file(save_hf(loaded, tmp_path / "ours", format="float") / SINGLE)
    assert loaded.config == config_from_hf(ROWS[row][0])
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert ours[name].dtype == array.dtype
        np.testing.assert_array_equal(ours[name], array)
