"""Decoder -> folder, in any format that is written."""

import warnings
from pathlib import Path

import numpy as np

from converters.formats import refuse, writer_of
from converters.names import leaves
from converters.orbax import save_orbax
from converters.output.describe import layouts_of, settings_of, write_description
from converters.output.encode import Encoding
from converters.output.folders import ORBAX, refuse_existing, refuse_unfinished
from converters.output.shards import ShardWriter
from converters.reading.entry import DTYPES
from jgptq.errors import ConfigError
from jgptq.models import Decoder
from jgptq.models.packed import RuntimeTensor
from jgptq.run.report import Report

FLOATS = ("float16", "bfloat16", "float32")
"""Dtypes that float tensors can be cast to."""


def save_hf(
    params: Decoder,
    folder: str | Path,
    format: str = "gptq",
    *,
    dtype: str | None = None,
    report: Report | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Writes a decoder as a folder that is whole or absent.

    The folder grows under `<folder>.partial` and is renamed when everything is on the disk.

    Args:
      params: a quantized decoder for the formats that pack; any decoder for "float", which expands packed kernels, and "orbax".
      folder: where to.
      format: "gptq" (v1, symmetric grids), "gptq_v2", "compressed-tensors", "float", or "orbax".
      dtype: for "float": cast all tensors to "float16", "bfloat16" or "float32". By default float leaves keep their dtype, and
        packed kernels are rounded to the embedding's.
      report: of the run that made the decoder; its table goes into the model card.
      max_shard_size: bytes in one shard, such as "5GB" or "300MiB".
      overwrite: replace a folder that exists.

    Returns:
      The folder.

    Raises:
      ConfigError: the format cannot hold these parameters.
      OutputError: the folder exists, or the disk is full.
    """
    out = Path(folder)
    refuse_existing(out, overwrite)
    refuse_unfinished(out, overwrite)
    if any(isinstance(getattr(module, attribute).get_value(), RuntimeTensor) for _, module, attribute in leaves(params)):
        raise ConfigError("the decoder is in the runtime layout, which files do not hold; save what `for_serving` was given")
    check_dtype(format, dtype)
    cast = None if dtype is None else next(known for known in DTYPES.values() if known.name == dtype)
    if format == ORBAX:
        return save_orbax(params, out, report=report)
    writer = writer_of(format, more=(ORBAX,))
    if writer.packs and params.quantization is None:
        raise ConfigError("the decoder holds no packed kernels; quantize it first, or write it with format='float'")
    embedding = params.embed_tokens.embedding.get_value().dtype  # which is never packed
    layouts = layouts_of(params, np.dtype(embedding) if cast is None else cast)
    if params.quantization is not None:
        refuse(writer, [used for used in settings_of(params).values() if used is not None])
        reordered = any(layout.reordered for layout in layouts.values())
        for warning in writer.warnings(params.quantization, params.config, reordered):
            warnings.warn(warning, UserWarning, stacklevel=2)
    encoding = Encoding(writer=writer, layouts=layouts, model_type=params.config.model_type, dtype=cast)
    values = [(path, attribute, getattr(module, attribute).get_value()) for path, module, attribute in leaves(params)]
    specs = [spec for path, attribute, leaf in values for spec in encoding.specs(path, attribute, leaf)]
    shards = ShardWriter(out, specs, max_shard_size=max_shard_size)
    for path, attribute, leaf in values:
        for name, array in encoding.tensors(path, attribute, leaf).items():
            shards.write(name, array)
    write_description(shards, params, format, writer, layouts, report=report, dtype=cast)
    return shards.finish()


def check_dtype(format: str, dtype: str | None) -> None:
    """Refuses a dtype that the tensors of a format cannot be cast to.

    Raises:
      ConfigError: an unknown dtype, or a format that keeps the dtype of each tensor.
    """
    if dtype is not None and format != "float":
        raise ConfigError(f"dtype casts the tensors of format 'float'; {format!r} keeps the dtype of each, so leave it out")
    if dtype not in (None, *FLOATS):
        raise ConfigError(f"dtype must be one of {', '.join(FLOATS)}, found {dtype!r}")
