"""Folders that are damaged, foreign or not there: what is wrong is named."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import safetensors.numpy
import tiny
from hypothesis import given
from hypothesis import strategies as st
from tiny import assert_same

import jgptq
from converters import load_hf, save_hf
from converters.checkpoint import INDEX, SINGLE
from converters.reading.hub import resolve_folder
from jgptq.errors import ArchitectureError, CheckpointError


def edit_header(path: Path, change) -> None:
    """Rewrites a safetensors file with a changed header over the same data."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


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
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.self_attn\.q_proj\.bias is none of a llama"):
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
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "bitsandbytes"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ArchitectureError,
        match=r"quantization method 'bitsandbytes' .*expected one of 'gptq', 'gptq_v2', 'compressed-tensors', 'awq'",
    ):
        load_hf(folder)


def test_a_folder_without_safetensors_names_the_files_it_has(folder: Path):
    (folder / SINGLE).rename(folder / "model.gguf")
    with pytest.raises(CheckpointError, match=r"found 'model\.gguf': save the model as safetensors first"):
        load_hf(folder)


@pytest.mark.parametrize("name", ["no_such_folder", "./no/such", "a/b/c"])
def test_names_that_are_neither_folder_nor_hub_id_are_refused(name: str):
    with pytest.raises(CheckpointError, match="not a folder"):
        resolve_folder(name)


def test_hub_ids_are_fetched_without_code_and_failures_name_them(monkeypatch: pytest.MonkeyPatch, folder: Path):
    calls = []

    def fetch(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((name, revision, allow_patterns))
        if name == "someone/lost":
            raise OSError("no network")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert_same(load_hf("someone/model"), tiny.decoder())
    load_hf("someone/model", revision="v1")
    assert [revision for _, revision, _ in calls] == [None, "v1"]
    assert not any("py" in pattern or "bin" in pattern for *_, patterns in calls for pattern in patterns)
    with pytest.raises(CheckpointError, match=r"someone/lost at revision 'v2'.*no network"):
        load_hf("someone/lost", revision="v2")


def test_torch_files_are_fetched_only_where_there_are_no_safetensors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    calls = []

    def fetch(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    resolve_folder("someone/model")
    assert ["pytorch_model*.bin" in patterns for patterns in calls] == [False, True]
    assert ["*.safetensors" in patterns for patterns in calls] == [True, False]


def test_a_revision_of_a_local_folder_is_refused(folder: Path):
    with pytest.raises(CheckpointError, match="a local folder has no revision 'main'"):
        load_hf(folder, revision="main")
