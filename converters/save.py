"""Decoder -> folder: GPTQ v1 and v2, or float."""

import dataclasses
import errno
import functools
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters.encode import encode_float, encode_packed, float_specs, packed_specs
from converters.names import leaves
from converters.quantization import Format, check_format, quantization_config, reader_warnings
from converters.shards import JOURNAL, ShardWriter, TensorSpec, partial_folder, refuse_existing
from jgptq.errors import ConfigError, OutputError
from jgptq.models import Decoder, checkpoint_name, config_to_hf, single_linears
from jgptq.models.packed import PackedTensor, RuntimeTensor
from jgptq.settings.rules import resolve
from jgptq.settings.solver import SolverConfig

COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files that are carried along from the folder that a decoder came from."""


def save_hf(
    params: Decoder, folder: str | Path, format: Format = "gptq", *, max_shard_size: int | str = "5GB", overwrite: bool = False
) -> Path:
    """Writes a decoder as a Hugging Face folder that is whole or absent.

    The folder grows under `<folder>.partial` and is renamed when everything is on the disk. Float leaves keep their dtype.

    Args:
      params: a quantized decoder for "gptq" and "gptq_v2"; any decoder for "float", which expands packed kernels.
      folder: where to.
      format: "gptq" (v1, symmetric grids), "gptq_v2", or "float".
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
    if (partial_folder(out) / JOURNAL).exists() and not overwrite:
        message = f"{partial_folder(out)} holds an unfinished run; finish it, delete it, or pass overwrite=True"
        raise OutputError(errno.EEXIST, message)
    if any(isinstance(getattr(module, attribute).get_value(), RuntimeTensor) for _, module, attribute in leaves(params)):
        raise ConfigError("the decoder is in the runtime layout, which files do not hold; save what `for_serving` was given")
    if format != "float" and params.quantization is None:
        raise ConfigError("the decoder holds no packed kernels; quantize it first, or write it with format='float'")
    if params.quantization is not None:
        check_format(format, params.quantization)
        for warning in reader_warnings(params.quantization, format):
            warnings.warn(warning, UserWarning, stacklevel=2)
    writer = ShardWriter(out, _specs(params, format), max_shard_size=max_shard_size)
    for path, module, attribute in leaves(params):
        leaf = getattr(module, attribute).get_value()
        for name, array in encode_leaf(params, path, attribute, leaf, format).items():
            writer.write(name, array)
    write_settings(writer, params, format)
    return writer.finish()


def encode_leaf(params: Decoder, path: str, attribute: str, leaf: Any, file_format: str) -> dict[str, np.ndarray]:
    """The tensors of one leaf in a format."""
    name = checkpoint_name(path, params.config.model_type)
    if isinstance(leaf, PackedTensor) and file_format != "float":
        return encode_packed(name, leaf, file_format)
    return encode_float(name, attribute, leaf, _expanded_dtype(params) if isinstance(leaf, PackedTensor) else None)


def write_settings(writer: ShardWriter, params: Decoder, file_format: str) -> None:
    """Writes config.json and quantize_config.json, and copies the tokenizer's files."""
    stored = str(params.embed_tokens.embedding.get_value().dtype)
    origin = params.origin
    hf = config_to_hf(params.config, stored) if origin is None else json.loads(origin.hf_config)
    if file_format != "float" and params.quantization is not None:
        kernels = dict(_kernels(params))
        quantization = quantization_config(params.quantization, file_format, _settings(params, kernels), params.config)
        shuffled = any(isinstance(kernel, PackedTensor) and kernel.group_index is not None for kernel in kernels.values())
        quantization["desc_act"] = shuffled
        if shuffled:
            warnings.warn("vLLM refuses desc_act with groups; GPTQModel loads it", UserWarning, stacklevel=3)
        hf["quantization_config"] = quantization
        writer.write_text("quantize_config.json", json.dumps(quantization, indent=2) + "\n")
    writer.write_text("config.json", json.dumps(hf, indent=2) + "\n")
    for name in COPIED:
        if origin is not None and (Path(origin.folder) / name).is_file():
            writer.guard(name, functools.partial(shutil.copyfile, Path(origin.folder) / name, writer.folder / name))


def _kernels(params: Decoder) -> Iterator[tuple[str, Any]]:
    """Paths of the linears of all blocks, and of the head, with their kernels."""
    for index, block in enumerate(params.layers):
        for path, linear in block.linears().items():
            for name, single in single_linears(path, linear):
                yield f"layers.{index}.{name}", single.kernel.get_value()
    if params.lm_head is not None:
        yield "lm_head", params.lm_head.kernel.get_value()


def _settings(params: Decoder, kernels: Mapping[str, Any]) -> dict[str, SolverConfig | None]:
    """The settings of each linear by its path, from its kernel; None for float. A grid is symmetric if the run's was: an
    asymmetric one may look so by chance."""
    used: dict[str, SolverConfig | None] = {}
    for path, kernel in kernels.items():
        used[path] = None
        if isinstance(kernel, PackedTensor) and params.quantization is not None:
            name = checkpoint_name(path, params.config.model_type)
            asked = resolve(params.quantization, name) or params.quantization.with_rule(None)
            sym = asked.sym and kernel.zeros is None
            used[path] = dataclasses.replace(asked, bits=kernel.bits, group_size=kernel.group_size, sym=sym)
    return used


def _specs(params: Decoder, file_format: str) -> list[TensorSpec]:
    specs = []
    for path, module, attribute in leaves(params):
        leaf = getattr(module, attribute).get_value()
        name = checkpoint_name(path, params.config.model_type)
        if not isinstance(leaf, PackedTensor):
            specs += float_specs(name, attribute, leaf.shape, leaf.dtype)
        elif file_format == "float":
            specs += float_specs(name, attribute, leaf.shape, _expanded_dtype(params))
        else:
            specs += packed_specs(name, leaf.shape, leaf.bits, leaf.group_size, np.dtype(leaf.scales.dtype))
    return specs


def _expanded_dtype(params: Decoder) -> np.dtype:
    """Expanded kernels are stored like the embedding, which is never packed."""
    return np.dtype(params.embed_tokens.embedding.get_value().dtype)
