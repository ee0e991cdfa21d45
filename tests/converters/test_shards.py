"""The writer: folders are whole or absent, and nothing of others is lost."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import tiny
from tiny import assert_same

from converters import load_hf, save_hf
from converters.checkpoint import INDEX
from converters.output.shards import ShardWriter, TensorSpec, parse_size
from jgptq.errors import ConfigError, OutputError


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


def test_an_existing_folder_is_kept_unless_overwriting(tmp_path: Path, folder: Path):
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="--overwrite"):
        save_hf(tiny.decoder(), folder, format="float")
    assert (folder / "mine.txt").exists()
    save_hf(tiny.decoder(seed=1), folder, format="float", overwrite=True)
    assert not (folder / "mine.txt").exists()
    assert_same(tiny.decoder(seed=1), load_hf(folder))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_disk_that_is_too_small_is_reported_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
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
