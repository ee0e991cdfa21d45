"""Folders: what is written is what is read."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny
from tiny import assert_same

import jgptq
from converters import load_hf, save_hf
from converters.checkpoint import SINGLE
from converters.formats import Written, writer_of
from converters.formats.gptq import dynamic_rules
from jgptq.errors import ConfigError
from jgptq.models.memory import to_device
from jgptq.settings.run import QuantizeConfig

FAMILIES = [
    {},
    {"tie_word_embeddings": True},
    {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    {"model_type": "mistral", "layer_windows": (8, 8)},
    {"model_type": "qwen2", "qkv_bias": True},
    {"model_type": "qwen3", "qk_norm": "head"},
    tiny.OPT,
    tiny.OPT_350M,
    tiny.GEMMA2,
    tiny.GEMMA3,
    tiny.GRANITE,
    tiny.COHERE,
    tiny.PHI,
    tiny.GPTJ,
    tiny.OLMO,
    tiny.SMOLLM3,
    tiny.NEMOTRON,
    tiny.GPT2,
    tiny.NEOX,
    tiny.BLOOM,
    tiny.FALCON,
    tiny.PHI3,
    tiny.GLM4,
]


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("changes", FAMILIES)
def test_float_folder_reads_back_as_it_was_written(tmp_path: Path, changes: dict, dtype):
    params = tiny.decoder(dtype=dtype, **changes)
    loaded = load_hf(save_hf(params, tmp_path / "out", format="float"), dtype="float32")
    assert_same(params, loaded)
    tokens = jnp.asarray(tiny.tokens(2))
    np.testing.assert_array_equal(params(tokens), loaded(tokens))


@pytest.mark.parametrize(
    ("bits", "sym", "file_format"),
    [(4, True, "gptq"), (4, True, "gptq_v2"), (3, False, "gptq_v2"), (2, True, "gptq"), (8, False, "gptq_v2")],
)
@pytest.mark.parametrize(
    "changes",
    [*FAMILIES[:3], tiny.OPT_350M, tiny.GEMMA2, tiny.GEMMA3, tiny.COHERE, tiny.GPTJ, tiny.GPT2, tiny.NEOX, tiny.PHI3],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_quantized_folder_reads_back_as_it_was_written(tmp_path: Path, changes: dict, bits: int, sym: bool, file_format):
    quantized, _ = jgptq.quantize(tiny.decoder(**changes), method="rtn", bits=bits, sym=sym, group_size=32)
    loaded = load_hf(save_hf(quantized, tmp_path / "out", format=file_format))
    assert_same(quantized, loaded)
    assert loaded.quantization == quantized.quantization


def test_files_are_what_the_format_says(tmp_path: Path):
    quantized, _ = jgptq.quantize(tiny.decoder(), tiny.tokens(), group_size=32)
    for file_format, word in (("gptq", 0x77777777), ("gptq_v2", 0x88888888)):
        tensors = safetensors.numpy.load_file(save_hf(quantized, tmp_path / file_format, format=file_format) / SINGLE)
        name = "model.layers.0.mlp.down_proj"
        parts = {
            part: (tensors[f"{name}.{part}"].dtype.name, tensors[f"{name}.{part}"].shape)
            for part in ("qweight", "qzeros", "scales", "g_idx")
        }
        assert parts == {
            "qweight": ("int32", (12, 64)),
            "qzeros": ("int32", (3, 8)),
            "scales": ("float16", (3, 64)),
            "g_idx": ("int32", (96,)),
        }
        assert np.all(tensors[f"{name}.qzeros"].view(np.uint32) == word)
        np.testing.assert_array_equal(tensors[f"{name}.g_idx"], np.arange(96) // 32)
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert config == json.loads((tmp_path / "gptq" / "quantize_config.json").read_text())
    expected = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, "lm_head": False}
    expected |= {"checkpoint_format": "gptq", "format": "gptq", "pack_dtype": "int32", "method": "gptq"}
    assert expected.items() <= config.items()


def test_float_export_of_a_quantized_decoder_holds_the_expanded_kernels(tmp_path: Path):
    quantized, _ = jgptq.quantize(tiny.decoder(), tiny.tokens(), group_size=32)
    loaded = load_hf(save_hf(quantized, tmp_path / "out", format="float"))
    kernel = quantized.layers[0].mlp.up_proj.kernel.get_value().dequantize()
    np.testing.assert_array_equal(loaded.layers[0].mlp.up_proj.kernel.get_value(), np.asarray(kernel, np.float16))
    assert loaded.quantization is None


def test_leaves_are_views_of_the_mapped_file_and_are_not_read_by_loading(folder: Path):
    for leaf in jax.tree.leaves(load_hf(folder)):
        assert isinstance(leaf, np.memmap)
        assert not leaf.flags.owndata


def test_moving_to_the_device_copies_and_survives_the_file(folder: Path):
    kernel = load_hf(folder).layers[0].self_attn.q_proj.kernel.get_value()
    moved = to_device(kernel)
    before = np.array(moved)
    (folder / SINGLE).write_bytes(b"\0" * (folder / SINGLE).stat().st_size)
    np.testing.assert_array_equal(moved, before)
    assert np.any(before != 0)


def test_safetensors_own_reader_accepts_the_files(folder: Path):
    with safetensors.safe_open(folder / SINGLE, framework="np") as reader:
        assert reader.metadata() == {"format": "pt"}
        assert reader.get_tensor("model.norm.weight").dtype == np.float16


def test_tokenizer_and_generation_files_are_carried_along(tmp_path: Path, folder: Path):
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        (folder / name).write_text(name)
    (folder / "secret.py").write_text("raise SystemExit")
    out = save_hf(load_hf(folder), tmp_path / "out", format="float")
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["chat_template.jinja", "config.json", "generation_config.json", SINGLE, "tokenizer.json", "tokenizer_config.json"]
    )


def test_keys_of_the_config_that_are_not_modelled_survive(tmp_path: Path, folder: Path):
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": [1, 7], "torch_dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config))
    out = save_hf(load_hf(folder), tmp_path / "out", format="float")
    assert json.loads((out / "config.json").read_text()) == config


def test_kept_linears_are_skipped_by_anchored_rules_that_also_match_fused_names():
    kept = [f"layers.{i}.mlp.{n}_proj" for i in (0, 1) for n in ("gate", "up")] + ["layers.1.mlp.down_proj"]
    rules = dynamic_rules(QuantizeConfig(), dict.fromkeys(kept), tiny.config())
    patterns = [re.compile(rule.removeprefix("-:")) for rule in rules]
    assert all(rule.startswith("-:^") and value == {} for rule, value in rules.items())

    def skipped(name: str) -> bool:
        return any(pattern.match(name) for pattern in patterns)

    assert skipped("model.layers.0.mlp.gate_proj")
    assert skipped("model.layers.1.mlp.gate_up_proj")
    assert skipped("model.layers.1.mlp.down_proj")
    assert not skipped("model.layers.0.mlp.down_proj")
    assert not skipped("model.layers.1.mlp.down_proj_extra")
    assert not skipped("model.layers.0.self_attn.q_proj")
    plain = Written(run=QuantizeConfig(), linears={}, model=tiny.config())
    assert "dynamic" not in writer_of("gptq").quantization_config(plain)


@pytest.mark.filterwarnings("ignore:transformers reads no rules")
def test_an_opt_is_written_under_its_own_names(tmp_path: Path):
    """Rules and tensors, and the rules that readers are given."""
    rules = {r"+:model\.decoder\.layers\.0\.fc2$": {"bits": 8}, r"-:.*layers\.\d\.self_attn\.(q|k|v)_proj": {}}
    quantized, report = jgptq.quantize(tiny.decoder(**tiny.OPT), tiny.tokens(), preset="fast", group_size=32, rules=rules)
    assert [row.name for row in report.rows][3:6] == [
        "decoder.layers.0.self_attn.out_proj",
        "decoder.layers.0.fc1",
        "decoder.layers.0.fc2",
    ]
    out = save_hf(quantized, tmp_path / "out")
    tensors = safetensors.numpy.load_file(out / SINGLE)
    assert tensors["model.decoder.layers.0.fc2.qweight"].shape == (96 * 8 // 32, 64)
    assert tensors["model.decoder.layers.1.fc2.qweight"].shape == (96 * 4 // 32, 64)
    assert "model.decoder.layers.1.self_attn.out_proj.qweight" in tensors
    dynamic = json.loads((out / "config.json").read_text())["quantization_config"]["dynamic"]
    names = [rf"model.decoder.layers.{index}.self_attn.{kind}_proj" for index in (0, 1) for kind in ("q", "k", "v", "qkv")]
    for name in [*names, "model.decoder.layers.0.fc2"]:
        matching = [(key[:2], value) for key, value in dynamic.items() if re.match(key[2:], name)]
        assert matching[0] == (("+:", {"bits": 8}) if name.endswith("fc2") else ("-:", {}))
        assert all(rule == matching[0] for rule in matching)
    for name in ("model.decoder.layers.1.fc2", "model.layers.0.self_attn.q_proj", "model.decoder.layers.0.self_attn.out_proj"):
        assert not any(re.match(key[2:], name) for key in dynamic)


@pytest.mark.parametrize(
    ("settings", "readers"),
    [
        ({}, []),
        ({"sym": False}, ["vLLM"]),
        ({"bits": 3}, ["vLLM"]),
        ({"group_size": 256}, ["vLLM"]),
        ({"group_size": 96}, ["vLLM", "GPTQModel"]),
    ],
)
def test_settings_that_a_reader_refuses_are_warned_of_by_its_name(settings: dict, readers: list[str]):
    sentences = writer_of("gptq").warnings(QuantizeConfig(**settings), tiny.config())
    assert [warning.split()[0] for warning in sentences] == readers
    assert writer_of("float").warnings(QuantizeConfig(**settings), tiny.config()) == []


def test_saving_warns(tmp_path: Path):
    quantized, _ = jgptq.quantize(tiny.decoder(), method="rtn", bits=2, group_size=32)
    with pytest.warns(UserWarning, match="vLLM refuses 2-bit"):
        save_hf(quantized, tmp_path / "out")


def test_v1_refuses_asymmetric_grids(tmp_path: Path):
    quantized, _ = jgptq.quantize(tiny.decoder(), method="rtn", sym=False, group_size=32)
    with pytest.raises(ConfigError, match="use 'gptq_v2'"):
        save_hf(quantized, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_formats_that_do_not_fit_the_parameters_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="quantize it first"):
        save_hf(tiny.decoder(), tmp_path / "out")
    quantized, _ = jgptq.quantize(tiny.decoder(), method="rtn", group_size=32)
    with pytest.raises(ConfigError, match="format must be one of gptq, gptq_v2, compressed-tensors, float, orbax"):
        save_hf(quantized, tmp_path / "out", format="awq")  # type: ignore[arg-type]
