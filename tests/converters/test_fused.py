"""Folders of families whose files hold fused or transposed linears: what transformers writes is read, and written again."""

from pathlib import Path

import fused_rows
import numpy as np
import pytest
import safetensors.numpy
from twins import decoder_of, logits, logits_of, twin

import jgptq
from converters import load_hf, save_hf
from converters.checkpoint import SINGLE
from jgptq.errors import CheckpointError

FAMILIES = ["gpt2", "gpt_bigcode", "gpt_neox", "bloom", "falcon_rw", "falcon_grouped", "phi3", "glm4"]


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / SINGLE)


def written_by_transformers(row: str, folder: Path) -> dict[str, np.ndarray]:
    """A folder of transformers' model, and its tensors."""
    twin(row).save_pretrained(folder)
    return tensors_of(folder)


@pytest.mark.parametrize("row", fused_rows.ROWS)
def test_a_folder_of_transformers_is_read_and_written_byte_by_byte(tmp_path: Path, row: str):
    theirs = written_by_transformers(row, tmp_path / "theirs")
    loaded = load_hf(tmp_path / "theirs")
    np.testing.assert_array_equal(logits(loaded), logits_of(row))
    ours = tensors_of(save_hf(loaded, tmp_path / "ours", format="float"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)


@pytest.mark.parametrize("row", FAMILIES)
def test_a_quantized_folder_gives_the_logits_of_what_was_written(tmp_path: Path, row: str):
    quantized, _ = jgptq.quantize(decoder_of(row), method="rtn", group_size=32)
    loaded = load_hf(save_hf(quantized, tmp_path / "out"))
    assert np.max(np.abs(logits(loaded) - logits_of(row))) > 1e-3
    np.testing.assert_array_equal(logits(loaded), logits(quantized))


@pytest.mark.parametrize(
    ("row", "name", "shape"),
    [
        ("gpt2", "transformer.h.0.attn.c_attn", (64, 192)),
        ("gpt_neox", "gpt_neox.layers.1.attention.query_key_value", (64, 192)),
        ("falcon_grouped", "transformer.h.1.self_attention.query_key_value", (64, 128)),
        ("phi3", "model.layers.0.mlp.gate_up_proj", (64, 192)),
    ],
)
def test_a_fused_linear_is_one_packed_linear_in_the_file(tmp_path: Path, row: str, name: str, shape: tuple[int, int]):
    """Packed kernels are stored as [K, N], whatever the layout of the float file is."""
    k, n = shape
    quantized, _ = jgptq.quantize(decoder_of(row), method="rtn", group_size=32)
    tensors = tensors_of(save_hf(quantized, tmp_path / "out"))
    assert tensors[f"{name}.qweight"].shape == (k * 4 // 32, n)
    assert tensors[f"{name}.scales"].shape == (k // 32, n)
    assert f"{name}.weight" not in tensors


@pytest.mark.parametrize("row", ["gpt2", "gpt2_inner_untied", "bloom", "bloom_six_heads"])
def test_names_of_the_decoder_alone_are_those_of_the_whole_model(tmp_path: Path, row: str):
    """The files of GPT-2 and BLOOM on the hub have them."""
    tensors = written_by_transformers(row, tmp_path)
    safetensors.numpy.save_file({name.removeprefix("transformer."): t for name, t in tensors.items()}, tmp_path / SINGLE)
    np.testing.assert_array_equal(logits(load_hf(tmp_path)), logits_of(row))


@pytest.mark.parametrize(
    ("row", "constants", "unknown"),
    [
        ("gpt2", ["transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"], "transformer.h.0.attention.bias"),
        (
            "gpt_neox",
            ["gpt_neox.layers.0.attention.bias", "gpt_neox.layers.1.attention.masked_bias"],
            "gpt_neox.layers.0.attn.bias",
        ),
        ("gpt_neox", ["gpt_neox.layers.1.attention.rotary_emb.inv_freq"], "gpt_neox.layers.1.mlp.bias"),
        ("bloom", [], "transformer.h.0.attn.bias"),
    ],
)
def test_constants_of_old_files_are_ignored_in_the_families_that_had_them(tmp_path: Path, row: str, constants, unknown: str):
    tensors = written_by_transformers(row, tmp_path)
    tensors |= {name: np.ones((1, 1, 4, 4), np.float32) for name in constants}
    safetensors.numpy.save_file(tensors, tmp_path / SINGLE)
    np.testing.assert_array_equal(logits(load_hf(tmp_path)), logits_of(row))
    safetensors.numpy.save_file(tensors | {unknown: np.ones(4, np.float32)}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=f"1 tensors that a {row} does not have: {unknown}"):
        load_hf(tmp_path)
