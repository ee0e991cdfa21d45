"""Folders of families whose files hold fused or transposed linears: what transformers writes is read, and written again."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import tiny
from twins import decoder_of, logits, logits_of, twin

import jgptq
from converters import load_hf, save_hf
from converters.checkpoint import SINGLE
from converters.formats.architectures import architecture_warnings
from converters.sink import FolderSink
from jgptq.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:GPTQModel 7.6")
FAMILIES = ["gpt2", "gpt_bigcode", "gpt_neox", "bloom", "falcon_rw", "falcon_grouped", "phi3", "glm4"]


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / SINGLE)


def written_by_transformers(row: str, folder: Path) -> dict[str, np.ndarray]:
    """A folder of transformers' model, and its tensors."""
    twin(row).save_pretrained(folder)
    return tensors_of(folder)


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


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("phi3", "GPTQModel 7.6 refuses a fused gate_up_proj"),
        ("glm", "GPTQModel 7.6 refuses a fused gate_up_proj"),
        ("gpt_neox", "GPTQModel 7.6 with transformers 5 does not read embed_out"),
        ("gpt_neox_one_after_the_other", None),
        ("gpt2", None),
    ],
)
def test_what_gptqmodel_does_not_load_is_warned_of(row: str, words: str | None):
    sentences = architecture_warnings(decoder_of(row).config)
    assert (words is None and not sentences) or (len(sentences) == 1 and sentences[0].startswith(words))


def test_a_quantized_output_projection_has_the_name_of_the_family(tmp_path: Path):
    rules = {"+:embed_out": {"bits": 8}}
    quantized, _ = jgptq.quantize(tiny.decoder(**tiny.NEOX), method="rtn", group_size=32, lm_head=True, rules=rules)
    with pytest.warns(UserWarning, match="transformers reads no rules"):
        out = save_hf(quantized, tmp_path / "out")
    assert tensors_of(out)["embed_out.qweight"].shape == (64 * 8 // 32, 96)
    written = json.loads((out / "config.json").read_text())["quantization_config"]
    assert written["lm_head"] is True
    assert written["dynamic"] == {"+:^embed_out$": {"bits": 8}}
    tiny.assert_same(quantized, load_hf(out))


def test_a_run_that_is_written_block_by_block_has_the_names_and_layouts_of_the_family(tmp_path: Path):
    written_by_transformers("gpt2", tmp_path / "in")
    params, config = load_hf(tmp_path / "in"), jgptq.QuantizeConfig(method="rtn", group_size=32)
    sink = FolderSink(tmp_path / "out", params, config, None)
    quantized, report = jgptq.quantize(params, config=config, sink=sink)
    sink.finish(quantized, report)
    whole = tensors_of(save_hf(quantized, tmp_path / "whole"))
    streamed = tensors_of(tmp_path / "out")
    assert streamed.keys() == whole.keys()
    assert all(np.array_equal(streamed[name], whole[name]) for name in whole)


def test_packed_weights_are_expanded_in_the_layout_of_the_family(tmp_path: Path):
    """Those of GPT-2 lie as [K, N]."""
    tensors = written_by_transformers("gpt2", tmp_path / "in")
    quantized, _ = jgptq.quantize(load_hf(tmp_path / "in"), method="rtn", group_size=32)
    out = save_hf(quantized, tmp_path / "out", format="float")
    assert {name: t.shape for name, t in tensors_of(out).items()} == {name: t.shape for name, t in tensors.items()}
    np.testing.assert_allclose(logits(load_hf(out)), logits(quantized), atol=1e-4)


@pytest.mark.parametrize("row", ["gpt2", "gpt2_inner_untied", "bloom", "bloom_six_heads"])
def test_names_of_the_decoder_alone_are_those_of_the_whole_model(tmp_path: Path, row: str):
    """The files of GPT-2 and BLOOM on the hub have them."""
    tensors = written_by_transformers(row, tmp_path)
    safetensors.numpy.save_file({name.removeprefix("transformer."): t for name, t in tensors.items()}, tmp_path / SINGLE)
    np.testing.assert_array_equal(logits(load_hf(tmp_path)), logits_of(row))


@pytest.mark.parametrize(("changes", "settings"), [(tiny.PHI3, {}), (tiny.GLM4, {"bits": 3, "sym": False, "group_size": -1})])
@pytest.mark.filterwarnings("ignore:vLLM")
def test_a_quantized_folder_whose_gate_and_up_are_parted_is_read_as_fused(tmp_path: Path, changes: dict, settings: dict):
    """GPTQModel writes them so."""
    quantized, _ = jgptq.quantize(tiny.decoder(**changes), method="rtn", **{"group_size": 32, **settings})
    out = save_hf(quantized, tmp_path / "out", format="gptq_v2")
    tiny.part_gate_and_up(out)
    tiny.assert_same(quantized, load_hf(out))


@pytest.mark.parametrize("part", ["g_idx", "scales"])
def test_parts_of_a_fused_linear_that_do_not_fit_each_other_are_refused(tmp_path: Path, part: str):
    quantized, _ = jgptq.quantize(tiny.decoder(**tiny.PHI3), method="rtn", group_size=32)
    out = save_hf(quantized, tmp_path / "out")
    tiny.part_gate_and_up(out)
    tensors = tensors_of(out)
    name = f"model.layers.1.mlp.up_proj.{part}"
    tensors[name] = tensors[name][:1] if part == "scales" else np.roll(tensors[name], 1)
    safetensors.numpy.save_file(tensors, out / SINGLE)
    with pytest.raises(CheckpointError, match=f"model.layers.1.mlp.gate_proj.{part} and {name} differ in bits, groups or order"):
        load_hf(out)


def test_an_output_projection_is_read_by_its_name_in_the_files_and_in_transformers_modules(tmp_path: Path):
    tensors = written_by_transformers("gpt_neox", tmp_path)
    safetensors.numpy.save_file(tensors | {"lm_head.weight": tensors.pop("embed_out.weight")}, tmp_path / SINGLE)
    np.testing.assert_array_equal(logits(load_hf(tmp_path)), logits_of("gpt_neox"))


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
    with pytest.raises(CheckpointError, match=f"{unknown} is none of a {row}"):
        load_hf(tmp_path)
