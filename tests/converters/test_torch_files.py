"""`pytorch_model.bin`: tensors are read as torch reads them, and nothing else is."""

import json
import os
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.torch
import tiny
import torch
from tiny import assert_same

import jgptq
from converters import load_hf, save_hf
from converters.checkpoint import SINGLE, open_checkpoint
from converters.reading.torch_archive import read_archive
from converters.reading.torch_pickle import read_pickle
from jgptq.errors import CheckpointError

BIN = "pytorch_model.bin"


@pytest.fixture
def torch_folder(folder: Path) -> Path:
    """The tiny folder, its weights as one torch file: a state dict with the versions of modules, some tensors transposed."""
    state = OrderedDict(safetensors.torch.load_file(folder / SINGLE))
    name = "model.layers.0.mlp.up_proj.weight"
    state[name] = torch.nn.Parameter(state[name].t().contiguous().t())
    state._metadata = {"": {"version": 1}}
    torch.save(state, folder / BIN)
    (folder / SINGLE).unlink()
    return folder


def test_a_torch_folder_reads_as_the_same_weights_in_safetensors(torch_folder: Path):
    loaded = load_hf(torch_folder)
    assert_same(loaded, tiny.decoder())
    assert all(isinstance(leaf, np.memmap) for leaf in jax.tree.leaves(loaded))


def test_a_quantized_folder_of_torch_files_reads_as_in_safetensors(tmp_path: Path):
    quantized, _ = jgptq.quantize(tiny.decoder(), method="rtn", group_size=32)
    out = save_hf(quantized, tmp_path / "out")
    torch.save(safetensors.torch.load_file(out / SINGLE), out / BIN)
    (out / SINGLE).unlink()
    assert_same(load_hf(out), quantized)


def test_a_run_on_torch_files_gives_what_one_on_safetensors_gives(torch_folder: Path):
    from_torch, _ = jgptq.quantize(load_hf(torch_folder), tiny.tokens(4), group_size=32, preset="fast")
    from_memory, _ = jgptq.quantize(tiny.decoder(), tiny.tokens(4), group_size=32, preset="fast")
    assert_same(from_torch, from_memory)


def test_shards_are_read_by_their_index(torch_folder: Path):
    state = torch.load(torch_folder / BIN, weights_only=True)
    (torch_folder / BIN).unlink()
    files = {name: f"pytorch_model-0000{1 + index % 2}-of-00002.bin" for index, name in enumerate(state)}
    for file in set(files.values()):
        torch.save({name: state[name] for name in state if files[name] == file}, torch_folder / file)
    (torch_folder / f"{BIN}.index.json").write_text(json.dumps({"weight_map": files}))
    assert_same(load_hf(torch_folder), tiny.decoder())
    (torch_folder / file).unlink()
    with pytest.raises(CheckpointError, match=f"{file}: the shard is missing"):
        load_hf(torch_folder)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_every_dtype_stride_offset_and_shared_storage_is_read_as_torch_reads_it(tmp_path: Path, protocol: int):
    base = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5)
    dtypes = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
    state = {str(dtype): base.to(dtype) for dtype in dtypes} | {"bool": base > 7}
    state |= {"base": base, "turned": base.permute(2, 0, 1), "part": base[1:, ::2, 3], "scalar": base[2, 3, 4], "tied": base}
    state["empty"] = torch.zeros(0, 3)
    torch.save(state, tmp_path / BIN, pickle_protocol=protocol)
    checkpoint = open_checkpoint(tmp_path)
    for name, expected in state.items():
        array = checkpoint.array(name)
        assert array.shape == tuple(expected.shape)
        wide = expected.float() if expected.dtype == torch.bfloat16 else expected
        np.testing.assert_array_equal(array.astype(np.float32) if wide is not expected else array, wide.numpy())
    assert checkpoint.entries["tied"] == checkpoint.entries["base"]


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Calls(os.system, "touch hacked"), r"the pickle asks for posix\.system, which is no tensor and is not executed"),
        (Calls(eval, "1"), r"asks for __builtin__\.eval"),
        (torch.zeros(2, dtype=torch.complex64), r"asks for torch\.ComplexFloatStorage"),
        (torch.nn.Linear(2, 2), r"asks for torch\.nn\.modules\.linear\.Linear"),
        ({"inner": torch.zeros(2)}, "expected a dict from names to tensors, found a dict under 'a'"),
        (3, "found a int under 'a'"),
        (torch.zeros(1).expand(10**9), "strides by which no two elements share a place"),
    ],
)
def test_anything_but_tensors_is_refused_by_name_and_not_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value, message: str
):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": value}, tmp_path / BIN)
    with pytest.raises(CheckpointError, match=rf"{BIN}: .*{message}"):
        read_archive(tmp_path / BIN)
    assert [path.name for path in tmp_path.iterdir()] == [BIN]


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"\x80\x02]q\x00r\xff\xff\xff\x7f.", "found a list"),  # an index of the memo that Python's machine would allocate
        (b"\x80\x02h\x07.", "entry 7 of its memo"),
        (b"\x80\x02.", "takes a value where there is none"),
        (b"\x80\x02(.", "takes a value where there is none"),
        (b"\x80\x02t.", "ends a list that it did not begin"),
        (b"\x80\x02}K\x01K\x02s.", "keys are no strings"),
        (b"\x80\x02}X\x01\x00\x00\x00aNX\x01\x00\x00\x00aNs.", "adds to something that is no dict"),
        (b"\x80\x02c__builtin__\neval\n.", "asks for __builtin__.eval"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "asks for os.system"),
        (b"(S'x'\nios\nsystem\n.", "uses STRING"),
        (b"\x80\x02X\xff\xff\xff\x7fa.", "expected"),
        (b"\x80\x02}X\x01\x00\x00\x00aK\x01s", "exhausted before seeing STOP"),
    ],
)
def test_pickles_that_are_no_state_dict_are_refused(program: bytes, message: str):
    with pytest.raises(ValueError, match=message):
        read_pickle(program)


def test_a_pickle_that_contains_itself_ends(tmp_path: Path):
    inner: list = []
    for _ in range(200):
        inner = [inner, inner]  # 2^200 leaves for whoever walks them
    inner.append(inner)
    with pytest.raises(ValueError, match="found a list under 'a'"):
        read_pickle(pickletools.optimize(pickle.dumps({"a": inner}, protocol=2)))


def test_the_old_format_says_what_to_do(tmp_path: Path):
    torch.save({"a": torch.zeros(2)}, tmp_path / BIN, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"torch's format from before 1\.6.*safetensors\.torch\.save_file"):
        read_archive(tmp_path / BIN)


def rewritten(path: Path, change, compression: int = zipfile.ZIP_STORED) -> Path:
    """The archive with its entries changed."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    change(entries)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize(
    ("change", "compression", "message"),
    [
        (
            lambda entries: entries.update({"archive/data/0": bytes(20)}),
            zipfile.ZIP_STORED,
            "a: expected a storage of 24 bytes, found 20",
        ),
        (lambda entries: entries.pop("archive/data/0"), zipfile.ZIP_STORED, "a: expected a storage of 24 bytes, found none"),
        (lambda entries: entries.pop("archive/data.pkl"), zipfile.ZIP_STORED, r"expected one entry data\.pkl, found 0"),
        (lambda entries: entries.update({"archive/byteorder": b"big"}), zipfile.ZIP_STORED, "little-endian"),
        (
            lambda entries: entries.update({"archive/data.pkl": bytes(9 * 2**20)}),
            zipfile.ZIP_STORED,
            "expected at most 8388608 bytes",
        ),
        (lambda entries: None, zipfile.ZIP_DEFLATED, "not compressed"),
    ],
)
def test_an_archive_that_does_not_hold_what_it_says_is_refused(tmp_path: Path, change, compression: int, message: str):
    torch.save({"a": torch.arange(6.0)}, tmp_path / "archive.bin")
    (tmp_path / "archive.bin").rename(tmp_path / BIN)
    with pytest.raises(CheckpointError, match=message):
        read_archive(rewritten(tmp_path / BIN, change, compression))


def test_a_storage_that_is_too_short_for_its_tensor_is_refused(tmp_path: Path):
    torch.save({"a": torch.arange(6.0)}, tmp_path / BIN)
    raw = (tmp_path / BIN).read_bytes()
    place = raw.index(b"K\x06\x85q")  # the shape (6,)
    changed = raw[: place + 1] + b"\x07" + raw[place + 2 :]
    (tmp_path / BIN).write_bytes(changed)
    with pytest.raises(CheckpointError, match=r"not a whole zip archive of torch .*CRC"):
        read_archive(tmp_path / BIN)

    def longer(entries: dict) -> None:
        entries["x/data.pkl"] = entries.pop("x/data.pkl").replace(b"K\x06\x85q", b"K\x07\x85q")

    torch.save({"a": torch.arange(6.0)}, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match="a: reaches behind its storage of 6 elements"):
        read_archive(rewritten(tmp_path / "x.bin", longer))


@pytest.mark.parametrize("kept", [2, 4, 300, -1, -30])
def test_a_truncated_torch_file_is_refused(torch_folder: Path, kept: int):
    (torch_folder / BIN).write_bytes((torch_folder / BIN).read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=rf"{BIN}: (truncated|not a whole zip)"):
        load_hf(torch_folder)
