"""Headers, JSON files and folders that were made to break a reader: each is refused, and the message says what is wrong."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import tiny
from tiny import assert_same

from converters import load_hf
from converters.checkpoint import INDEX, SINGLE, open_checkpoint
from converters.reading.json_file import read_json
from converters.reading.safetensors_header import read_header
from jgptq.errors import CheckpointError


def safetensors_file(path: Path, header: dict | str | bytes, data: bytes) -> Path:
    """A file with any header over any data."""
    raw = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def tensor(start: object = 0, stop: object = 8, shape: object = (2,), dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


DEEP = '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": tensor(), "b": tensor()}, "a and b overlap: expected data_offsets from 8, found 0"),
        ({"a": tensor(), "b": tensor(4, 12)}, "a and b overlap: expected data_offsets from 8, found 4"),
        ({"a": tensor(), "b": tensor(12, 20)}, "a and b leave a gap: expected data_offsets from 8, found 12"),
        ({"b": tensor(8, 16)}, "the header and b leave a gap"),
        ({"a": tensor(0.0, 8)}, r"a: expected data_offsets .*found \[0.0, 8\]"),
        ({"a": tensor("0", 8)}, r"a: expected data_offsets"),
        ({"a": tensor(False, 8)}, r"a: expected data_offsets .*found \[False, 8\]"),
        ({"a": tensor(-8, 0)}, r"a: impossible data_offsets \[-8, 0\]"),
        ({"a": tensor(0, 2**70, shape=[2**68])}, "a: expected at most 32 axes|a: impossible"),
        ({"a": tensor(shape=[2.0])}, r"a: expected a shape of whole numbers from 0, found \[2.0\]"),
        ({"a": tensor(shape=["2"])}, "a: expected a shape"),
        ({"a": tensor(shape=[True, 2])}, "a: expected a shape"),
        ({"a": tensor(shape=[-2, -1])}, "a: expected a shape"),
        ({"a": tensor(shape=2)}, "a: expected a shape"),
        ({"a": tensor(0, 0, shape=[0, 2**40, 2**40])}, "a: expected a shape of less than"),
        ({"a": tensor(shape=[1] * 33 + [2])}, "a: expected at most 32 axes"),
        ({"a": tensor(dtype=7)}, "a: expected the name of a dtype, found 7"),
        ({"a": tensor(dtype="F16")}, r"a: F16 \[2\] does not fill bytes 0 to 8"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "a: expected an object of dtype, shape and data_offsets"),
        ({"a\x1b[2J": tensor()}, r"expected names of printable characters, found 'a\\x1b\[2J'"),
        ({"\ud800": tensor()}, "surrogates not allowed"),
        ({"a": tensor() | {"more": 1}}, "a: expected an object of dtype, shape and data_offsets"),
        ({"a": tensor(), "__metadata__": {"format": "\ud800"}}, "surrogates not allowed"),
        ({"a": tensor(), "__metadata__": {"format": 1}}, "__metadata__: expected an object of strings"),
        ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": {}}', "the key 'a' occurs twice"),
        ('{"a": {"dtype": "F32", "shape": [2], "shape": [2], "data_offsets": [0, 8]}}', "the key 'shape' occurs twice"),
        ("[]", "expected a JSON object"),
        (DEEP, "nested too deep"),
        (b'{"\xff": 1}', "utf-8"),
    ],
)
def test_a_header_that_the_format_forbids_is_refused(tmp_path: Path, header, message: str):
    with pytest.raises(CheckpointError, match=rf"(?s)model\.safetensors: the header is corrupt \(.*({message})"):
        read_header(safetensors_file(tmp_path / SINGLE, header, bytes(8)))


def test_a_header_may_have_100_megabytes_and_no_more(tmp_path: Path):
    path = tmp_path / SINGLE
    with path.open("wb") as stream:
        stream.write((100_000_001).to_bytes(8, "little"))
        stream.truncate(100_000_100)  # a hole: no block of the disk is written
    with pytest.raises(CheckpointError, match="expected at most 100000000 bytes of it, found 100000001"):
        read_header(path)


def test_bytes_behind_the_last_tensor_are_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="bytes follow the last tensor: 77 bytes expected, 78 found"):
        read_header(safetensors_file(tmp_path / SINGLE, {"a": tensor()}, bytes(9)))


def test_empty_tensors_and_scalars_and_padding_are_read_as_safetensors_reads_them(tmp_path: Path):
    tensors = {"empty": np.zeros((0, 3), np.float32), "scalar": np.array(2.0, np.float32), "row": np.arange(3, dtype=np.int64)}
    safetensors.numpy.save_file(tensors, tmp_path / SINGLE)
    checkpoint = open_checkpoint(tmp_path)
    for name, expected in tensors.items():
        np.testing.assert_array_equal(checkpoint.array(name), expected)
    padded = safetensors_file(tmp_path / SINGLE, json.dumps({"a": tensor()}) + " " * 13, np.float32([1, 2]).tobytes())
    np.testing.assert_array_equal(open_checkpoint(padded.parent).array("a"), [1, 2])


def test_links_within_the_folder_and_to_the_hubs_blobs_are_followed_and_others_refused(tmp_path: Path):
    cache = tmp_path / "models--a--b"
    snapshot = cache / "snapshots" / "0123"
    model = tiny.folder(tmp_path / "model")
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, name in enumerate((SINGLE, "config.json")):
        (model / name).rename(cache / "blobs" / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    assert_same(load_hf(snapshot), tiny.decoder())
    (snapshot / SINGLE).unlink()
    (cache / "blobs" / "0").rename(snapshot / "weights")
    (snapshot / SINGLE).symlink_to("weights")
    assert_same(load_hf(snapshot), tiny.decoder())
    (snapshot / "weights").rename(tmp_path / "outside")
    (snapshot / SINGLE).unlink()
    (snapshot / SINGLE).symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match=rf"{SINGLE}: a link out of the folder, to .*outside"):
        load_hf(snapshot)


def test_what_is_no_regular_file_is_refused_and_not_waited_for(folder: Path):
    (folder / SINGLE).unlink()
    (folder / SINGLE).mkdir()
    with pytest.raises(CheckpointError, match="expected a file, found a folder or a device"):
        load_hf(folder)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json: expected a file, found a folder or a device"):
        load_hf(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("config.json")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be opened"):
        load_hf(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        (DEEP, "nested too deep"),
        ('{"a":' + "[" * 70 + "]" * 70 + "}", "nested more than 64 deep"),
        (b'{"a": "\xff"}', "utf-8"),
        ('{"a": 1' + "0" * 5000 + "}", "not readable as JSON"),
    ],
)
def test_json_that_means_two_things_or_fills_the_stack_is_refused(tmp_path: Path, text: str | bytes, message: str):
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=rf"config\.json: not readable as JSON \(.*{message}|{message}"):
        read_json(tmp_path / "config.json")


def test_a_tensor_in_two_shards_is_refused(sharded: Path):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    tensors = safetensors.numpy.load_file(second) | {"model.embed_tokens.weight": np.zeros((96, 64), np.float16)}
    safetensors.numpy.save_file(tensors, second)
    with pytest.raises(CheckpointError, match=rf"model\.embed_tokens\.weight is in {first.name} and in {second.name}"):
        load_hf(sharded)


def test_fused_linears_where_the_model_has_single_ones_are_named_with_what_is_missing(sharded: Path):
    index = json.loads((sharded / INDEX).read_text())
    name = "model.layers.1.self_attn.q_proj.weight"
    shard = sharded / index["weight_map"][name]
    tensors = safetensors.numpy.load_file(shard)
    tensors["model.layers.1.self_attn.qkv_proj.weight"] = tensors.pop(name)
    safetensors.numpy.save_file(tensors, shard)
    del index["weight_map"][name]
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        load_hf(sharded)
    assert "2 tensors do not fit config.json, a llama of vocab_size 96, hidden_size 64" in str(caught.value)
    assert f"{name} is missing, expected [64, 64]" in str(caught.value)
    assert "model.layers.1.self_attn.qkv_proj.weight is none of a llama" in str(caught.value)


@pytest.mark.parametrize("blocks", [1, 3, 60_000])
def test_another_number_of_blocks_than_the_tensors_have_is_refused_before_anything_is_built(folder: Path, blocks: int):
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": blocks}
    (folder / "config.json").write_text(json.dumps(config))
    held = rf"num_hidden_layers {blocks}, the tensors are those of another number of blocks: 2, up to model\.layers\.1"
    with pytest.raises(CheckpointError, match=held):
        load_hf(folder)


def test_a_head_that_is_said_to_be_tied_and_differs_from_the_embedding_is_refused(tmp_path: Path):
    folder = tiny.folder(tmp_path / "model", tie_word_embeddings=True)
    tensors = safetensors.numpy.load_file(folder / SINGLE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    safetensors.numpy.save_file(tensors, folder / SINGLE)
    load_hf(folder)
    tensors["lm_head.weight"][-1, -1] += 1
    safetensors.numpy.save_file(tensors, folder / SINGLE)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight.*tie_word_emb"):
        load_hf(folder)
