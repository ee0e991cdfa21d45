"""Sinks of a run: what they write, what a stopped run leaves, and how it resumes."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from stopping import Stopped, StoppingSink

import jgptq
from converters import FolderSink, load_hf, save_hf
from converters.output.shards import ShardWriter
from jgptq.errors import CalibrationError, ConfigError, OutputError
from jgptq.run import stage, tiles

SETTINGS = {"bits": 3, "group_size": 32}
pytestmark = pytest.mark.filterwarnings("ignore:vLLM refuses 3-bit")


@pytest.fixture
def checkpoint(tmp_path: Path):
    return load_hf(tiny.folder(tmp_path / "model", qkv_bias=True, model_type="qwen2"))


@pytest.mark.parametrize("tune", [0, 2])
def test_a_resumed_run_writes_what_an_uninterrupted_one_does(tmp_path: Path, checkpoint, tune: int):
    calib, settings = tiny.tokens(), jgptq.QuantizeConfig(**SETTINGS, tune=tune)
    whole = FolderSink(tmp_path / "whole", checkpoint, settings, calib)
    whole.finish(*jgptq.quantize(checkpoint, calib, config=settings, sink=whole))
    stopping = StoppingSink(tmp_path / "resumed", checkpoint, settings, calib)
    with pytest.raises(Stopped):
        jgptq.quantize(checkpoint, calib, config=settings, sink=stopping)
    assert not (tmp_path / "resumed").exists()
    journal = tmp_path / "resumed.partial" / "progress.jsonl"
    journal.write_text(journal.read_text() + '{"block": 1, "ro')  # a line that the stop cut short
    again = FolderSink(tmp_path / "resumed", checkpoint, settings, calib)
    solved = tiles._solve_tile._cache_size()
    result = jgptq.quantize(checkpoint, calib, config=settings, sink=again)
    again.finish(*result)
    assert tiles._solve_tile._cache_size() == solved
    assert len(result[1].rows) == 14
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "resumed").iterdir())
    for name in names:
        if name != "quantize_report.json":
            assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes(), name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_run_stopped_while_tuning_finds_what_was_not_tuned_yet(tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch):
    params = load_hf(tiny.folder(tmp_path / "model", dtype=getattr(jnp, dtype)))
    calib, settings = tiny.tokens(), jgptq.QuantizeConfig(**SETTINGS, tune=2)
    whole = FolderSink(tmp_path / "whole", params, settings, calib)
    quantized, report = jgptq.quantize(params, calib, config=settings, sink=whole)
    assert report.tuning.kept
    tiny.assert_same(load_hf(whole.finish(quantized, report)), quantized)  # what was tuned, not what the blocks held before

    class StoppedInFinish(FolderSink):
        def _encoded(self, parts):
            for path, name, array in super()._encoded(parts):
                if path == "norm":  # every block is in its place, tuned
                    raise Stopped
                yield path, name, array

    stopping = StoppedInFinish(tmp_path / "resumed", params, settings, calib)
    with pytest.raises(Stopped):
        stopping.finish(*jgptq.quantize(params, calib, config=settings, sink=stopping))
    again = FolderSink(tmp_path / "resumed", params, settings, calib)
    again.finish(*jgptq.quantize(params, calib, config=settings, sink=again))
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == (tmp_path / "resumed" / "model.safetensors").read_bytes()


def test_a_finished_block_is_not_solved_again(tmp_path: Path, checkpoint, monkeypatch: pytest.MonkeyPatch):
    calib, settings = tiny.tokens(), jgptq.QuantizeConfig(**SETTINGS)
    with pytest.raises(Stopped):
        jgptq.quantize(checkpoint, calib, config=settings, sink=StoppingSink(tmp_path / "out", checkpoint, settings, calib))
    real, solved = stage.solve_stage, []
    monkeypatch.setattr(stage, "solve_stage", lambda *args, **named: solved.append(args) or real(*args, **named))
    jgptq.quantize(checkpoint, calib, config=settings, sink=FolderSink(tmp_path / "out", checkpoint, settings, calib))
    assert len(solved) == 4


def test_the_rest_of_another_run_is_refused_and_can_be_dropped(tmp_path: Path, checkpoint):
    calib, settings = tiny.tokens(), jgptq.QuantizeConfig(**SETTINGS)
    with pytest.raises(Stopped):
        jgptq.quantize(checkpoint, calib, config=settings, sink=StoppingSink(tmp_path / "out", checkpoint, settings, calib))
    for other, ids in ((dataclasses.replace(settings, bits=4), calib), (settings, calib[::-1])):
        with pytest.raises(OutputError, match="unfinished run with other settings"):
            FolderSink(tmp_path / "out", checkpoint, other, ids)
    fresh = FolderSink(tmp_path / "out", checkpoint, settings, calib[::-1], overwrite=True)
    assert fresh.done() == {}


def test_memory_and_folder_sinks_give_the_same_files(tmp_path: Path, checkpoint):
    calib, settings = tiny.tokens(), jgptq.QuantizeConfig(**SETTINGS)
    sink = FolderSink(tmp_path / "streamed", checkpoint, settings, calib)
    sink.finish(*jgptq.quantize(checkpoint, calib, config=settings, sink=sink))
    save_hf(jgptq.quantize(checkpoint, calib, config=settings)[0], tmp_path / "kept")
    for name in ("model.safetensors", "config.json", "quantize_config.json"):
        assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "kept" / name).read_bytes()


def test_a_run_that_is_refused_leaves_nothing_behind(tmp_path: Path, checkpoint):
    sink = FolderSink(tmp_path / "out", checkpoint, jgptq.QuantizeConfig(group_size=32), None)
    with pytest.raises(CalibrationError):
        jgptq.quantize(checkpoint, None, group_size=32, sink=sink)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_finish_that_fails_loses_no_block(tmp_path: Path, checkpoint, monkeypatch: pytest.MonkeyPatch):
    calib, settings = tiny.tokens(), jgptq.QuantizeConfig(**SETTINGS)
    sink = FolderSink(tmp_path / "out", checkpoint, settings, calib)
    result = jgptq.quantize(checkpoint, calib, config=settings, sink=sink)
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "_rename", lambda self: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OutputError, match="No space left"):
            sink.finish(*result)
    solved = []
    real = stage.solve_stage
    monkeypatch.setattr(stage, "solve_stage", lambda *args, **named: solved.append(args) or real(*args, **named))
    again = FolderSink(tmp_path / "out", checkpoint, settings, calib)
    again.finish(*jgptq.quantize(checkpoint, calib, config=settings, sink=again))
    assert solved == []
    assert not (tmp_path / "out" / "progress.jsonl").exists()
    assert len(load_hf(tmp_path / "out").layers) == 2


def test_a_disk_that_fills_during_a_run_keeps_the_finished_blocks(tmp_path: Path, checkpoint, monkeypatch: pytest.MonkeyPatch):
    calib, settings = tiny.tokens(), jgptq.QuantizeConfig(**SETTINGS)
    real = ShardWriter._write_at

    def full(self, file: str, start: int, raw: np.ndarray) -> None:
        if len(sink.done()) == 1:
            raise OSError(28, "No space left on device")
        real(self, file, start, raw)

    sink = FolderSink(tmp_path / "out", checkpoint, settings, calib)
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "_write_at", full)
        with pytest.raises(OutputError, match=r"No space left on device.*resumes after the last finished block"):
            jgptq.quantize(checkpoint, calib, config=settings, sink=sink)
    again = FolderSink(tmp_path / "out", checkpoint, settings, calib)
    assert list(again.done()) == [0]
    again.finish(*jgptq.quantize(checkpoint, calib, config=settings, sink=again))
    assert len(load_hf(tmp_path / "out").layers) == 2


def test_a_run_is_not_continued_with_other_weights(tmp_path: Path):
    calib, settings = tiny.tokens(), jgptq.QuantizeConfig(**SETTINGS)
    first = StoppingSink(tmp_path / "out", tiny.decoder(seed=0), settings, calib)
    with pytest.raises(Stopped):
        jgptq.quantize(tiny.decoder(seed=0), calib, config=settings, sink=first)
    with pytest.raises(OutputError, match="other settings, tokens or weights"):
        FolderSink(tmp_path / "out", tiny.decoder(seed=1), settings, calib)
    assert list(FolderSink(tmp_path / "out", tiny.decoder(seed=0), settings, calib).done()) == [0]


def test_saving_over_an_unfinished_run_is_refused(tmp_path: Path, checkpoint):
    calib, settings = tiny.tokens(), jgptq.QuantizeConfig(**SETTINGS)
    with pytest.raises(Stopped):
        jgptq.quantize(checkpoint, calib, config=settings, sink=StoppingSink(tmp_path / "out", checkpoint, settings, calib))
    with pytest.raises(OutputError, match="unfinished run"):
        save_hf(tiny.decoder(), tmp_path / "out", format="float")
    assert (tmp_path / "out.partial" / "progress.jsonl").exists()


def test_a_sink_takes_only_the_run_that_it_was_made_for(tmp_path: Path, checkpoint):
    sink = FolderSink(tmp_path / "out", checkpoint, jgptq.QuantizeConfig(**SETTINGS), None)
    result = jgptq.quantize(checkpoint, method="rtn", **SETTINGS)
    with pytest.raises(ConfigError, match="other settings than the sink"):
        sink.finish(*result)
