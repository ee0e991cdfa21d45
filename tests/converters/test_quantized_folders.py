"""Quantized folders of other programs, and what is wrong with some of them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import tiny
from tiny import assert_same

import jgptq
from converters import load_hf, save_hf
from converters.checkpoint import SINGLE
from jgptq.errors import ArchitectureError, CheckpointError


def rewrite(folder: Path, change) -> Path:
    """Changes the tensors of a folder, as another writer may have left them."""
    tensors = safetensors.numpy.load_file(folder / SINGLE)
    change(tensors)
    safetensors.numpy.save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / SINGLE)
    return folder


@pytest.fixture
def quantized_folder(tmp_path: Path) -> Path:
    quantized, _ = jgptq.quantize(tiny.decoder(), method="rtn", sym=False, group_size=32)
    with pytest.warns(UserWarning, match="vLLM refuses asymmetric"):
        return save_hf(quantized, tmp_path / "quantized", format="gptq_v2")


def edit_config(folder: Path, change) -> None:
    for name in ("config.json", "quantize_config.json"):
        value = json.loads((folder / name).read_text())
        change(value["quantization_config"] if name == "config.json" else value)
        (folder / name).write_text(json.dumps(value))


def test_a_version_named_only_by_format_is_honoured(quantized_folder: Path):
    before = load_hf(quantized_folder)
    edit_config(quantized_folder, lambda config: config.pop("checkpoint_format"))
    assert_same(before, load_hf(quantized_folder))
    edit_config(quantized_folder, lambda config: config.update(format="gptq_p"))
    with pytest.raises(ArchitectureError, match="checkpoint_format 'gptq_p'"):
        load_hf(quantized_folder)


def test_a_folder_with_only_quantize_config_is_read(quantized_folder: Path):
    before = load_hf(quantized_folder)
    config = json.loads((quantized_folder / "config.json").read_text())
    del config["quantization_config"]
    (quantized_folder / "config.json").write_text(json.dumps(config))
    assert_same(before, load_hf(quantized_folder))


def test_biases_of_zeros_that_old_writers_add_are_passed_over_and_others_are_not(quantized_folder: Path):
    name = "model.layers.0.mlp.up_proj.bias"
    load_hf(rewrite(quantized_folder, lambda tensors: tensors.update({name: np.zeros(96, np.float16)})))
    rewrite(quantized_folder, lambda tensors: tensors.update({name: np.ones(96, np.float16)}))
    with pytest.raises(CheckpointError, match=r"up_proj\.bias"):
        load_hf(quantized_folder)


@pytest.mark.filterwarnings("ignore:vLLM refuses asymmetric")
def test_act_order_survives_and_is_declared(tmp_path: Path, quantized_folder: Path):
    order = np.random.default_rng(0).permutation(np.arange(96, dtype=np.int32) // 32)
    rewrite(quantized_folder, lambda tensors: tensors.update({"model.layers.0.mlp.down_proj.g_idx": order}))
    loaded = load_hf(quantized_folder)
    np.testing.assert_array_equal(loaded.layers[0].mlp.down_proj.kernel.get_value().group_index, order)
    with pytest.warns(UserWarning, match="vLLM refuses desc_act"):
        out = save_hf(loaded, tmp_path / "again", format="gptq_v2")
    assert json.loads((out / "config.json").read_text())["quantization_config"]["desc_act"] is True
    assert_same(loaded, load_hf(out))


@pytest.mark.filterwarnings("ignore:vLLM refuses asymmetric")
def test_a_linear_that_was_left_float_stays_declared(tmp_path: Path, quantized_folder: Path):
    def leave_float(tensors: dict) -> None:
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            del tensors[f"model.layers.0.mlp.up_proj.{part}"]
        tensors["model.layers.0.mlp.up_proj.weight"] = np.ones((96, 64), np.float16)

    out = save_hf(load_hf(rewrite(quantized_folder, leave_float)), tmp_path / "again", format="gptq_v2")
    rules = json.loads((out / "config.json").read_text())["quantization_config"]["dynamic"]
    assert [bool(re.match(rule[2:], "model.layers.0.mlp.up_proj")) for rule in rules] == [True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"model.layers.0.mlp.up_proj.qzeros": np.zeros(4, np.int32)}), "must be matrices"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.qweight": np.zeros((10, 96), np.int32)}), "fit no width"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.g_idx": np.full(64, 99, np.int32)}), "g_idx holds groups 99 to 99"),
    ],
)
def test_malformed_packed_parts_are_named(quantized_folder: Path, change, message: str):
    with pytest.raises(CheckpointError, match=rf"(?s)up_proj.*{message}"):
        load_hf(rewrite(quantized_folder, change))


@pytest.mark.parametrize("pattern", [r"(\w*)*x", r".*.*.*.*.*x", r"(a|aa)+$"])
def test_a_rule_whose_match_may_not_end_is_refused(quantized_folder: Path, pattern: str):
    edit_config(quantized_folder, lambda config: config.update(dynamic={f"+:{pattern}": {"bits": 4}}))
    with pytest.raises(CheckpointError, match=r"quantization_config\.dynamic: expected patterns of at most 4 repeats"):
        load_hf(quantized_folder)


@pytest.mark.parametrize("broken", [{"bits": None}, {"group_size": None}, {"group_size": 0}])
def test_a_quantization_config_without_numbers_is_refused(quantized_folder: Path, broken: dict):
    edit_config(quantized_folder, lambda config: config.update(broken))
    with pytest.raises(CheckpointError, match="needs bits and group_size"):
        load_hf(quantized_folder)
