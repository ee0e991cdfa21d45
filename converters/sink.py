"""A sink for the driver that writes each block to its final place as soon as it is quantized, and finds it there after a stop."""

import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from converters.checkpoint import Checkpoint
from converters.formats import FORMATS, Layout, Reader, Writer, Written, check_format, reader_of
from converters.formats.settings import HEAD
from converters.load import load_unit
from converters.names import Holder, leaves, unit_leaves
from converters.output.describe import write_description
from converters.output.encode import Encoding
from converters.output.folders import JOURNAL, partial_folder, refuse_existing
from converters.output.shards import ShardWriter, TensorSpec, parse_size
from converters.reading.entry import TensorEntry
from converters.reading.safetensors_header import read_header
from jgptq.errors import ConfigError, OutputError
from jgptq.models import Decoder, Unit, checkpoint_name, single_linears
from jgptq.run.plan import settings_by_path, unit_prefix, units
from jgptq.run.report import LinearReport, Report, row_to_dict
from jgptq.settings.run import QuantizeConfig


def check_streamed(file_format: str, config: QuantizeConfig) -> Writer:
    """The writer of a format that a run can write block by block.

    Raises:
      ConfigError: another format, or one that cannot hold the grid.
    """
    streamed = [known.name for known in FORMATS if known.writer is not None and known.writer.packs]
    if file_format not in streamed:
        raise ConfigError(
            f"a quantized run is written as one of {', '.join(streamed)}, found {file_format!r}; convert the result to another "
            "format with `jgptq convert`"
        )
    return check_format(file_format, config)


class FolderSink:
    """Writes blocks under `<out>.partial`; `finish` makes it `out`.

    A journal in the folder names the run (settings, tokens, model) in its first line and then each finished block. A sink
    that finds a journal of the same run continues it; one of another run is refused.

    Args:
      out: the folder to make.
      params: the float decoder that is quantized.
      config: the run's settings.
      calib: int32 calibration tokens `[samples, seq_len]`, which name the run; None where it uses none.
      file_format: "gptq", "gptq_v2" or "compressed-tensors".
      max_shard_size: bytes in one shard.
      batch_size: as given to the driver; the order of float32 sums depends on it, so it names the run too.
      overwrite: replace a folder that exists, and drop the rest of another run.

    Raises:
      ConfigError: a float format, or one that cannot hold the grid.
      OutputError: the folder exists, holds another unfinished run, or the disk cannot hold the result.
    """

    def __init__(
        self,
        out: str | Path,
        params: Decoder,
        config: QuantizeConfig,
        calib: np.ndarray | None,
        *,
        file_format: str = "gptq",
        max_shard_size: int | str = "5GB",
        batch_size: int | None = None,
        overwrite: bool = False,
    ):
        self.out = Path(out)
        refuse_existing(self.out, overwrite)
        writer = check_streamed(file_format, config)
        self._params, self._config, self._format = params, config, file_format
        self._planned = settings_by_path(params, config)
        self._encoding = Encoding(writer=writer, layouts=self._layouts(), model_type=params.config.model_type)
        reordered = any(layout.reordered for layout in self._encoding.layouts.values())
        for warning in writer.warnings(config, params.config, reordered):
            warnings.warn(warning, UserWarning, stacklevel=2)
        self._max_shard_size = parse_size(max_shard_size)
        self._run = _fingerprint(params, config, calib, file_format, self._max_shard_size, batch_size)
        self._journal = partial_folder(self.out) / JOURNAL
        self._resume = self._check_journal(overwrite)
        self._opened: ShardWriter | None = None

    @property
    def _writer(self) -> ShardWriter:
        """Reserves the space when it is first needed, so that a run that is refused leaves nothing behind."""
        if self._opened is None:
            self._opened = ShardWriter(self.out, self._specs(), max_shard_size=self._max_shard_size, resume=self._resume)
            if self._resume:
                self._drop_cut_line()
            else:
                self._append({"run": self._run})
        return self._opened

    def done(self) -> Mapping[int, tuple[Unit, tuple[LinearReport, ...]]]:
        """The blocks that are already written, as views of the mapped shards, with their report rows."""
        writer, entries = self._writer, dict[str, TensorEntry]()
        lines = list(map(json.loads, self._journal.read_text(encoding="utf-8").splitlines()[1:]))
        movable = [_movable_file(line["block"]) for line in lines] if self._config.tune else []
        for file in (*writer.files, *movable):
            entries |= read_header(writer.folder / file)
        checkpoint = Checkpoint(writer.folder, entries)
        parts, reader, finished = units(self._params, self._config), self._reader(), {}
        for line in lines:
            block = load_unit(line["block"], parts[line["block"]], checkpoint, reader)
            finished[line["block"]] = (block, tuple(LinearReport(**row) for row in line["rows"]))
        return finished

    def write(self, index: int, block: Unit, rows: tuple[LinearReport, ...]) -> None:
        """Writes a finished block and notes it in the journal once it is on the disk.

        What tuning may move after the last block goes into a file of its own, and into its place when the run is finished: a run
        that is stopped on the way finds it as it was.
        """
        movable: dict[str, np.ndarray] = {}
        may_move = self._movable(index, block)
        for _, name, array in self._encoded(unit_leaves(index, block)):
            if name in may_move:
                movable[name] = np.ascontiguousarray(array)  # safetensors writes the memory of a view as if it were whole
            else:
                self._writer.write(name, array)
        if self._config.tune:
            self._write_movable(index, movable)
        self._writer.sync()
        self._append({"block": index, "rows": [row_to_dict(row) for row in rows]})

    def finish(self, qparams: Decoder, report: Report) -> Path:
        """Writes what is not in a block, the settings and the report, and renames the folder.

        Args:
          qparams: what the driver returned.
          report: the driver's report.

        Returns:
          The finished folder.

        Raises:
          ConfigError: the decoder was quantized with other settings than this sink was made for.
          OutputError: the disk is full; the finished blocks stay where they are.
        """
        if qparams.quantization != self._config:
            raise ConfigError("the decoder was quantized with other settings than the sink's; give both the same config")
        parts = enumerate(units(qparams, self._config))
        movable = {name for index, unit in parts for name in self._movable(index, unit)}
        for path, name, array in self._encoded(leaves(qparams)):
            in_unit = path.startswith("layers.") or (path == HEAD and self._config.lm_head)
            if not in_unit or name in movable:  # what is left is in its place already
                self._writer.write(name, array)
        write_description(self._writer, qparams, self._format, self._encoding.writer, self._encoding.layouts, report=report)
        folder = self._writer.finish()
        # The journal goes last: until the folder is whole, a run that fails finds all its blocks again.
        for file in folder.glob(_movable_file("*")):
            file.unlink()
        (folder / JOURNAL).unlink()
        return folder

    def _encoded(self, parts: Iterable[tuple[str, Holder, str]]) -> Iterator[tuple[str, str, np.ndarray]]:
        """The tensors of leaves, as (path of the module, name, array)."""
        for path, module, attribute in parts:
            leaf = getattr(module, attribute).get_value()
            for name, array in self._encoding.tensors(path, attribute, leaf).items():
                yield path, name, array

    def _layouts(self) -> dict[str, Layout]:
        """What the files hold of each linear that is packed, by its path."""
        shapes = {
            path: getattr(module, attribute).get_value().shape
            for path, module, attribute in leaves(self._params)
            if attribute == "kernel"
        }
        return {path: Layout.planned(shapes[path], used) for path, used in self._planned.items() if used is not None}

    def _reader(self) -> Reader:
        """Reads what this sink writes."""
        written = Written(run=self._config, linears=self._planned, model=self._params.config)
        quantization = self._encoding.writer.quantization_config(written)
        assert quantization is not None  # a writer that packs has one
        return reader_of(quantization)

    def _movable(self, index: int, unit: Unit) -> set[str]:
        """The tensors of a unit that tuning may move: scales of codes, and of norms."""
        if not self._config.tune:
            return set()
        scales = self._encoding.writer.scales
        single = [path for stack, linear in unit.linears().items() for path, _ in single_linears(stack, linear)]
        names = [(path, scales) for path in single] + [(path, "weight") for path in unit.norms()]
        prefix, architecture = unit_prefix(unit, index), self._params.config.model_type
        return {f"{checkpoint_name(prefix + path, architecture)}.{part}" for path, part in names}

    def _write_movable(self, index: int, tensors: dict[str, np.ndarray]) -> None:
        file = _movable_file(index)

        def write() -> None:
            with (self._writer.folder / file).open("wb") as stream:
                stream.write(save(tensors))
                stream.flush()
                os.fsync(stream.fileno())

        self._writer.guard(file, write)

    def _specs(self) -> list[TensorSpec]:
        values = [(path, attribute, getattr(module, attribute).get_value()) for path, module, attribute in leaves(self._params)]
        return [spec for path, attribute, leaf in values for spec in self._encoding.specs(path, attribute, leaf)]

    def _check_journal(self, overwrite: bool) -> bool:
        """Whether there is an unfinished run to continue."""
        if not self._journal.exists():
            return False
        first, newline, _ = self._journal.read_text(encoding="utf-8").partition("\n")
        if first == json.dumps({"run": self._run}) and newline:
            return True
        if overwrite or not newline:  # a first line that was cut short names no run, and no block follows it
            return False
        message = f"{self._journal.parent} holds an unfinished run with other settings, tokens or weights; "
        raise OutputError(
            f"{message}repeat that run's command to continue it, delete the folder, or pass --overwrite (overwrite=True)"
        )

    def _drop_cut_line(self) -> None:
        """A last line that a stop cut short is a block that was not finished."""
        raw = self._journal.read_bytes()
        if not raw.endswith(b"\n"):
            os.truncate(self._journal, raw.rfind(b"\n") + 1)

    def _append(self, line: dict) -> None:
        def write() -> None:
            with self._journal.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
                stream.flush()
                os.fsync(stream.fileno())

        self._writer.guard(JOURNAL, write)


def _movable_file(index: int | str) -> str:
    """Where the tensors of a block lie that tuning may move."""
    return f"movable-{index}.tensors"


def _fingerprint(params: Decoder, config: QuantizeConfig, calib: np.ndarray | None, *settings: object) -> str:
    """Names a run: settings, tokens, and the model: its config, its files' sizes and times, and all that is not in them."""
    digest = hashlib.sha256(repr((dataclasses.asdict(config), params.config, settings)).encode())
    if calib is not None:
        digest.update(np.ascontiguousarray(calib, np.int32).tobytes())
    if params.origin is not None:
        digest.update(params.origin.hf_config.encode())
        weights = (path for path in Path(params.origin.folder).iterdir() if path.suffix in (".safetensors", ".bin"))
        for file in sorted(weights):
            digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    for path, module, attribute in leaves(params):
        leaf = getattr(module, attribute).get_value()
        if not isinstance(leaf, np.memmap):
            digest.update(f"{path}.{attribute}".encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()
