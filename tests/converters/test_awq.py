"""AWQ files, held against an encoder and a decoder that share nothing with what reads them."""

from pathlib import Path

import foreign
import numpy as np
import pytest
from foreign import assert_expands_to
from hypothesis import given
from hypothesis import strategies as st

from converters import load_hf
from converters.formats import reader_of
from converters.formats.awq import unpack_nibbles
from jgptq.errors import ArchitectureError, CheckpointError
from jgptq.settings.rules import resolve


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 4))
def test_the_nibbles_of_awq_are_unpacked_to_their_columns(seed: int, rows: int, n_words: int):
    codes = np.random.default_rng(seed).integers(0, 16, (rows, 8 * n_words))
    np.testing.assert_array_equal(unpack_nibbles(foreign.awq_words(codes)), codes)


def test_an_awq_folder_is_read(tmp_path: Path):
    folder, weights = foreign.awq_folder(tmp_path / "awq")
    loaded = load_hf(folder)
    assert_expands_to(loaded, weights)
    assert (loaded.quantization.bits, loaded.quantization.group_size, loaded.quantization.sym) == (4, 32, False)
    assert resolve(loaded.quantization, "model.layers.0.self_attn.o_proj") is None
    assert resolve(loaded.quantization, "model.layers.0.mlp.up_proj") is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "gemv"}, "version is 'gemv', expected 'gemm'"),
        ({"version": "MARLIN"}, "version is 'marlin', expected 'gemm'"),
        ({"zero_point": False}, "zero_point is False, expected True"),
        ({"backend": "llm-awq", "bits": 3}, "bits is 3, expected 4; backend is 'llm-awq'"),
    ],
)
def test_variants_of_awq_are_refused_by_name(changes: dict, message: str):
    with pytest.raises(ArchitectureError, match=message):
        reader_of({"quant_method": "awq", "bits": 4, "group_size": 32} | changes)


def test_awq_parts_that_do_not_fit_are_named(tmp_path: Path):
    folder, _ = foreign.awq_folder(tmp_path / "awq", group_size=64)
    with pytest.raises(CheckpointError, match=r"0\.mlp\.up_proj: qzeros \[2, 12\], expected \[1, 12\]; scales"):
        load_hf(folder)
