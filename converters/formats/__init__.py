"""File formats of quantized linears: a table of objects, one file each."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from converters.formats.awq import AWQ
from converters.formats.base import Format, Layout, Reader, Writer, Written
from converters.formats.compressed_tensors import COMPRESSED_TENSORS
from converters.formats.floating import FLOAT
from converters.formats.gptq import V1, V2
from converters.formats.settings import used_settings
from jgptq.errors import ArchitectureError, ConfigError
from jgptq.settings.run import QuantizeConfig
from jgptq.settings.solver import SolverConfig

__all__ = ["FORMATS", "Format", "Layout", "Reader", "Writer", "Written", "check_format", "reader_of", "refuse", "writer_of"]

FORMATS: tuple[Format, ...] = (V1, V2, COMPRESSED_TENSORS, AWQ, FLOAT)
"""Every format. The first one that recognizes a `quantization_config` reads it."""


def reader_of(quantization: Mapping[str, Any]) -> Reader:
    """The reader of a checkpoint with this `quantization_config`.

    Raises:
      ArchitectureError: a method, or a variant of it, that is not implemented; names those that are.
      CheckpointError: a config that contradicts itself or lacks what is needed.
    """
    for known in FORMATS:
        if known.reader is not None and known.detects(quantization):
            return known.reader(quantization)
    readable = ", ".join(repr(known.name) for known in FORMATS if known.reader is not None)
    raise ArchitectureError(
        f"config.json: quantization method {quantization.get('quant_method')!r} cannot be read; expected one of {readable}, or a "
        "float checkpoint"
    )


def writer_of(name: str, more: Sequence[str] = ()) -> Writer:
    """The writer of a format.

    Args:
      name: of the format.
      more: formats that the caller writes itself, for the error.

    Raises:
      ConfigError: an unknown format, or one that is only read; names those that are written.
    """
    writers = {known.name: known.writer for known in FORMATS if known.writer is not None}
    if name not in writers:
        raise ConfigError(f"format must be one of {', '.join([*writers, *more])}, found {name!r}")
    return writers[name]


def check_format(name: str, config: QuantizeConfig) -> Writer:
    """The writer of a format, unless it cannot hold a grid that the run may make.

    Raises:
      ConfigError: an unknown format, or a grid that it cannot hold; says which format can.
    """
    writer = writer_of(name)
    refuse(writer, used_settings(config))
    return writer


def refuse(writer: Writer, settings: Iterable[SolverConfig]) -> None:
    """Raises a ConfigError with every reason why the format cannot hold linears of these settings; returns if there is none."""
    reasons = dict.fromkeys(reason for used in settings if (reason := writer.refusal(used)) is not None)
    if reasons:
        raise ConfigError("; ".join(reasons))
