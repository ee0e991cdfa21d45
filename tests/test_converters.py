"""Folders: what is written is what is read, and what is damaged is named."""

import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny
from hypothesis import given
from hypothesis import strategies as st

import jgptq
from converters import load_hf, save_hf
from converters.checkpoint import INDEX, SINGLE, resolve_folder
from converters.quantization import quantization_config, reader_warnings, skip_rules
from converters.shards import ShardWriter, TensorSpec, parse_size
from jgptq.config import QuantizeConfig
from jgptq.errors import ArchitectureError, CheckpointError, ConfigError, OutputError
from jgptq.hostmem import to_device

FAMILIES = [
    {},
    {"tie_word_embeddings": True},
    {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    {"model_type": "mistral", "layer_windows": (8, 8)},
    {"model_type": "qwen2", "qkv_bias": True},
    {"model_type": "qwen3", "qk_norm": True},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.folder(tmp_path / "model")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return save_hf(tiny.decoder(), tmp_path / "model", format="float", max_shard_size="40KB")


def assert_same(left, right) -> None:
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def edit_header(path: Path, change) -> None:
    """Rewrites a safetensors file with a changed header over the same data."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


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
@pytest.mark.parametrize("changes", FAMILIES[:3])
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
        found = {
            part: (tensors[f"{name}.{part}"].dtype.name, tensors[f"{name}.{part}"].shape)
            for part in ("qweight", "qzeros", "scales", "g_idx")
        }
        assert found == {
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


def test_shards_stay_below_the_limit_and_their_index_is_complete(sharded: Path):
    index = json.loads((sharded / INDEX).read_text())
    shards = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    names = {}
    for shard in shards:
        assert (sharded / shard).stat().st_size < 50_000
        names |= dict.fromkeys(safetensors.numpy.load_file(sharded / shard), shard)
    assert index["weight_map"] == names
    assert_same(tiny.decoder(), load_hf(sharded))


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


# Rules and warnings


def test_kept_linears_are_skipped_by_anchored_rules_that_also_match_fused_names():
    rules = skip_rules([f"layers.{i}.mlp.{n}_proj" for i in (0, 1) for n in ("gate", "up")] + ["layers.1.mlp.down_proj"], 2)
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
    assert "dynamic" not in quantization_config(QuantizeConfig(), "gptq", [], 2)


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
    found = reader_warnings(QuantizeConfig(**settings), "gptq")
    assert [warning.split()[0] for warning in found] == readers
    assert reader_warnings(QuantizeConfig(**settings), "float") == []


def test_saving_warns(tmp_path: Path):
    quantized, _ = jgptq.quantize(tiny.decoder(), method="rtn", bits=2, group_size=32)
    with pytest.warns(UserWarning, match="vLLM refuses 2-bit"):
        save_hf(quantized, tmp_path / "out")


# Bad input


def test_v1_refuses_asymmetric_grids(tmp_path: Path):
    quantized, _ = jgptq.quantize(tiny.decoder(), method="rtn", sym=False, group_size=32)
    with pytest.raises(ConfigError, match="use 'gptq_v2'"):
        save_hf(quantized, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_formats_that_do_not_fit_the_parameters_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="quantize it first"):
        save_hf(tiny.decoder(), tmp_path / "out")
    quantized, _ = jgptq.quantize(tiny.decoder(), method="rtn", group_size=32)
    with pytest.raises(ConfigError, match="format must be one of gptq, gptq_v2, float"):
        save_hf(quantized, tmp_path / "out", format="awq")  # type: ignore[arg-type]


def test_an_existing_folder_is_kept_unless_overwriting(tmp_path: Path, folder: Path):
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="--overwrite"):
        save_hf(tiny.decoder(), folder, format="float")
    assert (folder / "mine.txt").exists()
    save_hf(tiny.decoder(seed=1), folder, format="float", overwrite=True)
    assert not (folder / "mine.txt").exists()
    assert_same(tiny.decoder(seed=1), load_hf(folder))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("kept", [3, 8, 200, -1])
def test_a_truncated_file_says_how_many_bytes_are_missing(folder: Path, kept: int):
    raw = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(raw[:kept])
    with pytest.raises(CheckpointError, match=rf"(?s){SINGLE}: truncated.*\d+ .*found|expected, {len(raw) - 1} found"):
        load_hf(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["model.norm.weight"].update(dtype="F32"),
        lambda header: header["model.norm.weight"].update(shape=[63]),
        lambda header: header["model.norm.weight"].update(data_offsets=[10, 4]),
        lambda header: header["model.norm.weight"].pop("shape"),
        lambda header: header.update({"model.norm.weight": 7}),
    ],
)
def test_a_header_that_contradicts_itself_is_corrupt(folder: Path, change):
    edit_header(folder / SINGLE, change)
    with pytest.raises(CheckpointError, match=f"{SINGLE}: the header is corrupt"):
        load_hf(folder)


@given(st.binary(max_size=300))
def test_no_bytes_crash_the_reader(tmp_path_factory: pytest.TempPathFactory, raw: bytes):
    folder = tmp_path_factory.mktemp("garbage")
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "vocab_size": 32,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            }
        )
    )
    (folder / SINGLE).write_bytes(raw)
    with pytest.raises(CheckpointError):
        load_hf(folder)


def test_missing_shards_are_listed_together(sharded: Path):
    shards = sorted(sharded.glob("*.safetensors"))
    shards[0].unlink()
    shards[2].unlink()
    with pytest.raises(
        CheckpointError, match=rf"(?s){shards[0].name}: the shard is missing.*{shards[2].name}: the shard is missing"
    ):
        load_hf(sharded)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/outside.safetensors", "a/b.safetensors", ".."])
def test_an_index_that_leaves_the_folder_is_refused(sharded: Path, name: str):
    outside = sharded.parent / "outside.safetensors"
    shutil.copy(next(sharded.glob("*.safetensors")), outside)
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="files outside the folder"):
        load_hf(sharded)


def test_an_index_that_names_the_wrong_shard_is_refused(sharded: Path):
    index = json.loads((sharded / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = files[0]
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"model.norm.weight is not in {files[0]}"):
        load_hf(sharded)


def test_all_missing_misshapen_and_integer_tensors_are_listed_at_once(folder: Path):
    tensors = safetensors.numpy.load_file(folder / SINGLE)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.layers.1.self_attn.k_proj.weight"] = np.zeros((64, 32), np.float16)
    tensors["model.norm.weight"] = np.zeros(64, np.int32)
    safetensors.numpy.save_file(tensors, folder / SINGLE)
    with pytest.raises(CheckpointError) as caught:
        load_hf(folder)
    message = str(caught.value)
    assert "3 tensors do not fit" in message
    assert "model.layers.0.mlp.up_proj.weight is missing, expected [96, 64]" in message
    assert "model.layers.1.self_attn.k_proj.weight has shape [64, 32], expected [32, 64]" in message
    assert "model.norm.weight has dtype I32, expected a float" in message


def test_tensors_that_the_model_does_not_have_are_refused_but_for_known_leftovers(folder: Path):
    tensors = safetensors.numpy.load_file(folder / SINGLE)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)
    safetensors.numpy.save_file(tensors, folder / SINGLE)
    load_hf(folder)
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(64, np.float16)
    safetensors.numpy.save_file(tensors, folder / SINGLE)
    with pytest.raises(CheckpointError, match=r"1 tensors that a llama does not have: model\.layers\.0\.self_attn\.q_proj\.bias"):
        load_hf(folder)


def test_quantized_parts_that_are_missing_or_misshapen_are_named(tmp_path: Path):
    quantized, _ = jgptq.quantize(tiny.decoder(), method="rtn", group_size=32)
    out = save_hf(quantized, tmp_path / "out")
    tensors = safetensors.numpy.load_file(out / SINGLE)
    del tensors["model.layers.0.mlp.up_proj.scales"]
    tensors["model.layers.1.mlp.up_proj.qweight"] = tensors["model.layers.1.mlp.up_proj.qweight"][:, :32].copy()
    safetensors.numpy.save_file(tensors, out / SINGLE)
    with pytest.raises(
        CheckpointError, match=r"(?s)0\.mlp\.up_proj\.scales is missing.*1\.mlp\.up_proj: qweight must be int32 \[8, 96\]"
    ):
        load_hf(out)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, CheckpointError, "config.json: missing"),
        ("{", CheckpointError, "not readable as JSON"),
        ("[]", CheckpointError, "expected a JSON object"),
        ('{"model_type": "mamba"}', ArchitectureError, "known are llama, mistral, qwen2, qwen3"),
        ('{"model_type": "llama"}', CheckpointError, "vocab_size, hidden_size"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(folder: Path, content: str | None, error: type, message: str):
    (folder / "config.json").unlink() if content is None else (folder / "config.json").write_text(content)
    with pytest.raises(error, match=message):
        load_hf(folder)


def test_other_quantization_methods_are_refused_by_name(folder: Path):
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "awq"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArchitectureError, match="quantization method 'awq'"):
        load_hf(folder)


def test_a_folder_without_safetensors_says_what_it_found(folder: Path):
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"found pytorch_model\.bin: save the model as safetensors first"):
        load_hf(folder)


@pytest.mark.parametrize("name", ["no_such_folder", "./no/such", "a/b/c"])
def test_names_that_are_neither_folder_nor_hub_id_are_refused(name: str):
    with pytest.raises(CheckpointError, match="not a folder"):
        resolve_folder(name)


def test_hub_ids_are_fetched_without_code_and_failures_name_them(monkeypatch: pytest.MonkeyPatch, folder: Path):
    calls = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        calls.append((name, allow_patterns))
        if name == "someone/lost":
            raise OSError("no network")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert_same(load_hf("someone/model"), tiny.decoder())
    assert not any("py" in pattern or "bin" in pattern for pattern in calls[0][1])
    with pytest.raises(CheckpointError, match=r"someone/lost.*no network"):
        load_hf("someone/lost")


def test_a_disk_that_is_too_small_is_found_out_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int, start: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OutputError, match=r"No space left on device; the result needs \d+ bytes, \d+ are free") as caught:
        save_hf(tiny.decoder(), tmp_path / "out", format="float")
    assert caught.value.errno == 28
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"out\.partial cannot be made: Not a directory"):
        save_hf(tiny.decoder(), tmp_path / "file" / "out", format="float")


def test_a_writer_takes_only_what_was_planned(tmp_path: Path):
    writer = ShardWriter(tmp_path / "out", [TensorSpec("a", np.dtype(np.float16), (2, 3))])
    for wrong in (np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float16)):
        with pytest.raises(ValueError, match=r"a: planned as float16 \[2, 3\]"):
            writer.write("a", wrong)


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), (1000, 1000), ("20kb", 20_000)])
def test_sizes_are_parsed(text, size: int):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "5 parsecs", "0", "1.2.3"])
def test_sizes_that_are_none_are_refused(text: str):
    with pytest.raises(ConfigError, match="max_shard_size"):
        parse_size(text)


# Files of other writers


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
    np.testing.assert_array_equal(loaded.layers[0].mlp.down_proj.kernel.get_value().order, order)
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


@pytest.mark.parametrize("broken", [{"bits": None}, {"group_size": None}, {"group_size": 0}])
def test_a_quantization_config_without_numbers_is_refused(quantized_folder: Path, broken: dict):
    edit_config(quantized_folder, lambda config: config.update(broken))
    with pytest.raises(CheckpointError, match="needs bits and group_size"):
        load_hf(quantized_folder)


# Nothing is lost


@pytest.mark.parametrize("make", [lambda path: path.write_text(""), lambda path: path.symlink_to(path.parent)])
def test_a_file_or_a_link_in_the_way_is_refused_even_when_overwriting(tmp_path: Path, make):
    make(tmp_path / "out")
    with pytest.raises(OutputError, match="is a file or a link"):
        save_hf(tiny.decoder(), tmp_path / "out", format="float", overwrite=True)


def test_folders_that_no_run_made_are_never_removed(tmp_path: Path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="no run made it"):
        save_hf(tiny.decoder(), tmp_path / "out", format="float", overwrite=True)
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "mine"
