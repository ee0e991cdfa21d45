"""Folder -> folder of another format: the same codes, scales and zero points, or an error that says what would be lost."""

import json
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from converters.load import load_hf
from converters.names import leaves
from converters.output.describe import REPORT, kernels_of
from converters.output.folders import refuse_existing
from converters.save import check_dtype, save_hf
from jgptq.errors import CheckpointError, ConfigError
from jgptq.models import Decoder, checkpoint_name
from jgptq.models.packed import PackedTensor
from jgptq.run.report import LinearReport, Report, TuningReport


def convert(
    source: str | Path,
    out: str | Path,
    format: str,
    *,
    dtype: str | None = None,
    lossy: bool = False,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Writes a checkpoint in another format.

    Between formats that store codes, the codes, scales, zero points and groups stay as they are, bit for bit. Format "float"
    expands `scale * (code - zero)`, which has as many significant bits as scale and code together: with float16 scales it is
    exact in float32, and rounded in float16 and bfloat16.

    Args:
      source: a folder, or a hub id.
      out: the folder to make.
      format: as for `save_hf`.
      dtype: of all tensors in format "float"; by default float32 for a quantized checkpoint, and that of each tensor for a
        float one.
      lossy: round where the dtype does not hold the weights, instead of refusing.
      max_shard_size: bytes in one shard.
      overwrite: replace a folder that exists.

    Returns:
      The folder.

    Raises:
      ConfigError: the format cannot hold the checkpoint, or its dtype would round it and `lossy` is False.
      CheckpointError: as `load_hf`.
      OutputError: the folder exists, or the disk is full.
    """
    refuse_existing(Path(out), overwrite)
    check_dtype(format, dtype)
    params = load_hf(source)
    if format == "float" and dtype is None and params.quantization is not None:
        dtype = "float32"
    lost = list(rounded(params, dtype)) if format == "float" and dtype is not None else []
    if lost and not lossy:
        shown = "; ".join(lost[:3]) + (f"; and {len(lost) - 3} more" if len(lost) > 3 else "")
        raise ConfigError(
            f"{source}: {dtype} would round {len(lost)} tensors: {shown}. "
            "Take float32, or pass --lossy (lossy=True) to round them"
        )
    report = None if format == "float" else _report_of(params)
    return save_hf(params, out, format, dtype=dtype, report=report, max_shard_size=max_shard_size, overwrite=overwrite)


def rounded(params: Decoder, dtype: str) -> Iterator[str]:
    """A phrase for each tensor that a dtype does not hold."""
    held, range_held = _precision(jnp.dtype(dtype))
    for path, kernel in kernels_of(params):
        if isinstance(kernel, PackedTensor):
            stored, exponents = _precision(kernel.scales.dtype)
            if (needed := stored + kernel.bits) > held or exponents > range_held:
                name, scale = checkpoint_name(path, params.config.model_type), kernel.scales.dtype
                yield f"{name} ({scale} scale times {kernel.bits}-bit code: {needed} significant bits, {dtype} holds {held})"
    for path, module, attribute in leaves(params):
        leaf = getattr(module, attribute).get_value()
        if not isinstance(leaf, PackedTensor) and any(np.greater(_precision(leaf.dtype), (held, range_held))):
            yield f"{checkpoint_name(path, params.config.model_type)} ({leaf.dtype})"


def _precision(dtype: np.dtype) -> tuple[int, int]:
    """The bits of a significand, the implicit one included, and of an exponent."""
    info = jnp.finfo(dtype)
    return int(info.nmant) + 1, int(info.nexp)


def _report_of(params: Decoder) -> Report | None:
    """The report that a quantized folder of this project holds, for the card of its copy."""
    if params.quantization is None or params.origin is None or not (Path(params.origin.folder) / REPORT).is_file():
        return None
    path = Path(params.origin.folder) / REPORT
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        rows = tuple(LinearReport(**row) for row in body["linears"])
        tuning = None if body["tuning"] is None else TuningReport(**body["tuning"])
        return Report(config=params.quantization, rows=rows, seconds=body["seconds"], tuning=tuning)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: not a report of this version ({error!r}); delete the file") from None
