"""Of every family a small model is quantized, written and read back."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from twins import ROWS, decoder_of

import jgptq
from converters import load_hf, save_hf
from converters.checkpoint import SINGLE
from jgptq.models import FAMILIES

FIRST = {hf["model_type"]: row for row, (hf, _) in reversed(ROWS.items())}
"""Of each `model_type`, the first row."""
pytestmark = pytest.mark.filterwarnings("ignore:GPTQModel 7.6")


def test_every_family_has_a_row():
    assert {FAMILIES[name].model_type or name for name in FAMILIES} == set(FIRST)


@pytest.mark.parametrize("family", FIRST)
def test_a_quantized_model_of_the_family_reads_back_as_it_was_written(tmp_path: Path, family: str):
    params = decoder_of(FIRST[family])
    quantized, report = jgptq.quantize(params, method="rtn", scale="minmax", group_size=32)
    kept = [row.note for row in report.rows if row.outcome != "ROUNDED"]
    assert len(kept) < len(report.rows)
    assert all("multiple of 32" in note for note in kept)
    first = save_hf(quantized, tmp_path / "first")
    again = save_hf(load_hf(first), tmp_path / "again")
    tensors, same = (safetensors.numpy.load_file(folder / SINGLE) for folder in (first, again))
    assert any(name.endswith(".qweight") for name in tensors)
    assert tensors.keys() == same.keys()
    assert all(np.array_equal(array, same[name]) for name, array in tensors.items())
