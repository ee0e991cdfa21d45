"""Quantized formats of other programs: what is read, what is refused by name, and what is written for them."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import pytest
import safetensors.numpy
import tiny
from foreign import assert_expands_to, packed_kernels
from stopping import Stopped, StoppingSink

import jgptq
from converters import FolderSink, formats, load_hf, save_hf
from converters.checkpoint import SINGLE
from converters.formats import base, gptq, reader_of
from converters.formats.schemes import read_schemes
from jgptq.errors import ArchitectureError, CheckpointError, ConfigError
from jgptq.models.packed import pack
from jgptq.settings.rule import Rule
from jgptq.settings.rules import resolve

SCHEMES: dict[str, dict[str, Any]] = {
    "q_proj": {"bits": 4, "group_size": 32, "sym": True},
    "k_proj": {"bits": 4, "group_size": 32, "sym": True, "reordered": True},
    "v_proj": {"bits": 4, "group_size": 32, "sym": False},
    "up_proj": {"bits": 8, "group_size": -1, "sym": True},
    "gate_proj": {"bits": 8, "group_size": -1, "sym": False},
    "down_proj": {"bits": 8, "group_size": 32, "sym": False, "reordered": True},
}
GROUPS = {
    "group_0": foreign.group(["Linear"]),
    "group_1": foreign.group([r"re:.*v_proj$"], symmetric=False),
    "group_2": foreign.group([r"re:.*mlp\.(up|gate)_proj$"], num_bits=8, strategy="channel", group_size=None),
    "group_3": foreign.group(
        ["model.layers.0.mlp.gate_proj", "model.layers.1.mlp.gate_proj"],
        num_bits=8, strategy="channel", group_size=None, symmetric=False,
    ),
    "group_4": foreign.group(["re:.*down_proj"], num_bits=8, symmetric=False, actorder="group"),
}  # fmt: skip
IGNORED = ["lm_head", "model.layers.0.self_attn.o_proj", r"re:.*1\.self_attn\.o_proj"]


@pytest.fixture
def compressed(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A folder with every kind of scheme."""
    folder, packed, weights = tiny.folder(tmp_path / "model"), {}, {}
    for seed, (name, shape) in enumerate(foreign.linear_names(folder).items()):
        if scheme := SCHEMES.get(name.rpartition(".")[2]):
            packed[name], weights[name] = foreign.compressed_parts(seed, shape, **scheme)
    return foreign.replace_linears(folder, packed, foreign.compressed_config(GROUPS, IGNORED)), weights


def test_a_compressed_tensors_folder_with_every_kind_of_scheme_is_read(compressed: tuple):
    folder, weights = compressed
    loaded = load_hf(folder)
    assert_expands_to(loaded, weights)
    grids = {name: (kernel.bits, kernel.group_size) for name, kernel in packed_kernels(loaded).items()}
    for name, grid in grids.items():
        scheme = SCHEMES[name.rpartition(".")[2]]
        assert grid == (scheme["bits"], scheme["group_size"])
        used = resolve(loaded.quantization, name)
        assert used is not None
        assert (used.bits, used.group_size) == grid
    assert resolve(loaded.quantization, "model.layers.1.self_attn.o_proj") is None


@pytest.mark.filterwarnings("ignore:transformers", "ignore:compressed-tensors from 0.20")
def test_a_compressed_tensors_folder_is_written_as_it_was_read(compressed: tuple, tmp_path: Path):
    folder, weights = compressed
    before = load_hf(folder)
    out = save_hf(before, tmp_path / "again", format="compressed-tensors")
    after = load_hf(out)
    tiny.assert_same(before, after)
    assert_expands_to(after, weights)
    stored, again = (safetensors.numpy.load_file(path / SINGLE) for path in (folder, out))
    for name, array in stored.items():
        np.testing.assert_array_equal(array, again[name], err_msg=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "int-quantized"}, "format 'int-quantized' cannot be read; expected 'pack-quantized'"),
        ({"format": "float-quantized"}, "format 'float-quantized' cannot be read"),
        ({"format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized' cannot be read"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is set"),
        ({"config_groups": {"a": foreign.group(["Linear"], num_bits=3)}}, "a has num_bits 3, expected 4 or 8"),
        ({"config_groups": {"a": foreign.group(["Linear"], type="float")}}, "a has type 'float', expected 'int'"),
        ({"config_groups": {"a": foreign.group(["Linear"], strategy="block")}}, "a has strategy 'block', expected 'group' or"),
        ({"config_groups": {"a": foreign.group(["Linear"]) | {"input_activations": {"num_bits": 8}}}}, "a quantizes input_act"),
        ({"config_groups": {"a": foreign.group(["Linear"], group_size=None)}}, "a has group_size None"),
    ],
)
def test_variants_of_compressed_tensors_are_refused_by_name(changes: dict, message: str):
    config = foreign.compressed_config({"a": foreign.group(["Linear"])}) | changes
    with pytest.raises(ArchitectureError, match=message):
        reader_of(config)


def test_a_compressed_tensors_config_that_is_malformed_is_refused():
    for changes, message in (
        ({"config_groups": {}}, "config_groups as an object"),
        ({"ignore": ["re:("]}, "is no name and no regex"),
    ):
        with pytest.raises(CheckpointError, match=message):
            reader_of(foreign.compressed_config({"a": foreign.group(["Linear"])}) | changes)


def test_a_name_is_matched_exactly_before_by_regex_and_by_class():
    groups = {
        "a": foreign.group(["Linear"]),
        "b": foreign.group(["re:model"], num_bits=8),
        "c": foreign.group(["model.x"], group_size=64),
    }
    schemes = read_schemes(foreign.compressed_config(groups), (4, 8))
    found = [schemes.of(name) for name in ("other", "model.y", "model.x", "lm_head")]
    assert [None if scheme is None else (scheme.bits, scheme.group_size) for scheme in found] == [(4, 32), (8, 32), (4, 64), None]


@pytest.mark.parametrize(
    ("part", "array", "message"),
    [
        ("weight_shape", np.array([64, 65], np.int64), r"weight_shape is \[64, 65\], expected \[64, 64\]"),
        ("weight_zero_point", np.zeros((8, 2), np.int32), "symmetric, but weight_zero_point is there"),
        ("weight_packed", np.zeros((64, 4), np.int32), r"qweight must be int32 \[8, 64\]"),
        ("weight_g_idx", np.full(64, 2, np.int32), "weight_g_idx holds groups 2 to 2, there are 2"),
    ],
)
def test_compressed_parts_that_contradict_their_scheme_are_named(compressed: tuple, part: str, array: np.ndarray, message: str):
    folder, _ = compressed
    tensors = safetensors.numpy.load_file(folder / SINGLE)
    safetensors.numpy.save_file(tensors | {f"model.layers.0.self_attn.q_proj.{part}": array}, folder / SINGLE)
    with pytest.raises(CheckpointError, match=rf"0\.self_attn\.q_proj.*{message}"):
        load_hf(folder)


def test_an_order_of_minus_ones_is_none(compressed: tuple):
    folder, weights = compressed
    tensors = safetensors.numpy.load_file(folder / SINGLE)
    unset = {"model.layers.0.self_attn.q_proj.weight_g_idx": np.full(64, -1, np.int32)}
    safetensors.numpy.save_file(tensors | unset, folder / SINGLE)
    assert_expands_to(load_hf(folder), weights)


def test_a_packed_linear_that_no_target_matches_is_named(compressed: tuple):
    folder, _ = compressed
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"].append("model.layers.1.self_attn.q_proj")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"1\.self_attn\.q_proj: packed, but no target"):
        load_hf(folder)


def quantization_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def test_linears_of_one_grid_are_written_as_one_group_of_the_class(tmp_path: Path):
    quantized, _ = jgptq.quantize(tiny.decoder(), method="rtn", group_size=32)
    out = save_hf(quantized, tmp_path / "out", format="compressed-tensors")
    config = quantization_of(out)
    assert {name: group["targets"] for name, group in config["config_groups"].items()} == {"group_0": ["Linear"]}
    assert config["config_groups"]["group_0"]["weights"] == {
        "num_bits": 4, "type": "int", "symmetric": True, "dynamic": False, "strategy": "group", "group_size": 32,
    }  # fmt: skip
    assert config["ignore"] == ["lm_head"]
    tensors = safetensors.numpy.load_file(out / SINGLE)
    name = "model.layers.0.mlp.down_proj"
    parts = {key.rpartition(".")[2]: (array.dtype.name, array.shape) for key, array in tensors.items() if key.startswith(name)}
    assert parts == {"weight_packed": ("int32", (64, 12)), "weight_scale": ("float16", (64, 3)), "weight_shape": ("int64", (2,))}


MIXED = {r"-:.*1\.self_attn\.[qkv]_proj": {}, "+:.*down_proj": {"bits": 8, "sym": False}, "lm_head": {"group_size": -1}}


@pytest.mark.filterwarnings("ignore:transformers")
def test_mixed_settings_are_written_as_groups_that_readers_of_fused_names_match(tmp_path: Path):
    quantized, _ = jgptq.quantize(tiny.decoder(), method="rtn", group_size=32, rules=MIXED, lm_head=True)
    out = save_hf(quantized, tmp_path / "out", format="compressed-tensors")
    config, loaded = quantization_of(out), load_hf(out)
    tiny.assert_same(quantized, loaded)
    assert loaded.quantization == quantized.quantization
    assert config["ignore"] == [f"model.layers.1.self_attn.{kind}_proj" for kind in "qkv"]

    def groups_of(name: str) -> list[tuple[int, str]]:
        return [
            (group["weights"]["num_bits"], group["weights"]["strategy"])
            for group in config["config_groups"].values()
            if any(re.match(target[3:], name) if target.startswith("re:") else target == name for target in group["targets"])
        ]

    assert groups_of("model.layers.0.self_attn.qkv_proj") == groups_of("model.layers.0.self_attn.q_proj") == [(4, "group")]
    assert groups_of("model.layers.1.mlp.gate_up_proj") == [(4, "group")]
    assert groups_of("model.layers.1.mlp.down_proj") == [(8, "group")]
    assert groups_of("lm_head") == [(4, "channel")]
    assert groups_of("model.layers.1.self_attn.q_proj") == []


@pytest.mark.filterwarnings("ignore:transformers")
def test_projections_around_the_blocks_are_on_the_list_of_what_is_float(tmp_path: Path):
    quantized, _ = jgptq.quantize(tiny.decoder(**tiny.OPT_350M), method="rtn", group_size=32)
    out = save_hf(quantized, tmp_path / "out", format="compressed-tensors")
    assert quantization_of(out)["ignore"] == ["model.decoder.project_in", "model.decoder.project_out", "lm_head"]
    tiny.assert_same(quantized, load_hf(out))


@pytest.mark.filterwarnings("ignore:transformers")
def test_zero_points_that_are_symmetric_by_chance_are_stored_where_the_scheme_declares_them(tmp_path: Path):
    quantized, _ = jgptq.quantize(tiny.decoder(), method="rtn", group_size=32, sym=False)
    linear = quantized.layers[0].mlp.down_proj
    linear.kernel.set_value(dataclasses.replace(linear.kernel.get_value(), zeros=None))
    out = save_hf(quantized, tmp_path / "out", format="compressed-tensors")
    stored = safetensors.numpy.load_file(out / SINGLE)["model.layers.0.mlp.down_proj.weight_zero_point"]
    assert stored.shape == (8, 3)
    assert np.all(stored.view(np.uint32) == 0x88888888)
    tiny.assert_same(quantized, load_hf(out))


def test_widths_that_compressed_tensors_does_not_hold_are_refused_before_anything_is_written(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"\(4, 8\) bits, not 3; use 'gptq'"):
        FolderSink(
            tmp_path / "out", tiny.decoder(), jgptq.QuantizeConfig(bits=3, group_size=32), None, file_format="compressed-tensors"
        )
    quantized, _ = jgptq.quantize(tiny.decoder(), method="rtn", group_size=32, rules={".*down_proj": {"bits": 2}})
    with pytest.raises(ConfigError, match=r"\(4, 8\) bits, not 2"):
        save_hf(quantized, tmp_path / "out", format="compressed-tensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "settings", [{"tune": 2.0}, {"sym": False, "order": "desc_act", "rules": (Rule(pattern=".*o_proj", bits=8),)}]
)
@pytest.mark.filterwarnings("ignore:transformers", "ignore:compressed-tensors from 0.20")
def test_a_stopped_run_resumes_in_compressed_tensors(tmp_path: Path, settings: dict):
    params, calib = tiny.decoder(), tiny.tokens()
    config = jgptq.QuantizeConfig(group_size=32, **settings)
    quantized, report = jgptq.quantize(params, calib, config=config)
    whole = save_hf(quantized, tmp_path / "whole", format="compressed-tensors", report=report)
    sink = StoppingSink(tmp_path / "out", params, config, calib, file_format="compressed-tensors")
    with pytest.raises(Stopped):
        jgptq.quantize(params, calib, config=config, sink=sink)
    again = FolderSink(tmp_path / "out", params, config, calib, file_format="compressed-tensors")
    assert list(again.done()) == [0]
    out = again.finish(*jgptq.quantize(params, calib, config=config, sink=again))
    for name in (SINGLE, "config.json", "README.md"):
        assert (whole / name).read_bytes() == (out / name).read_bytes(), name
    tiny.assert_same(load_hf(out), quantized)


def test_the_format_that_contributing_adds_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    page = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (example,) = [
        block for block in re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE) if "BytesReader" in block
    ]
    names = vars(gptq) | vars(base) | {"pack": pack, "__name__": "example"}
    exec(compile(example, "CONTRIBUTING.md", "exec"), names)
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, names["BYTES"]))
    folder, packed, weights = tiny.folder(tmp_path / "model"), {}, {}
    for seed, (name, shape) in enumerate(foreign.linear_names(folder).items()):
        codes, scales, zeros = foreign.draw(seed, shape, 32, 4, sym=True)
        packed[name] = {"codes": codes.astype(np.uint8), "scales": scales}
        weights[name] = np.repeat(scales.astype(np.float64), 32, axis=0) * (codes - np.repeat(zeros, 32, axis=0))
    foreign.replace_linears(folder, packed, {"quant_method": "bytes", "group_size": 32})
    assert_expands_to(load_hf(folder), weights)
