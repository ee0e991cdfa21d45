"""What a decoder's folder holds besides tensors: config.json, the `quantization_config`, the tokenizer's files, a model card."""

import dataclasses
import functools
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters.formats import Layout, Writer, Written
from converters.names import stored_rule
from converters.output.card import CARD, base_model, model_card
from converters.output.folders import PartialFolder
from jgptq.models import Decoder, checkpoint_name, config_to_hf, single_linears
from jgptq.models.packed import PackedTensor
from jgptq.run.report import Report
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
REPORT = "quantize_report.json"


def kernels_of(params: Decoder) -> Iterator[tuple[str, Any]]:
    """Paths of the linears of all blocks, and of the head, with their kernels."""
    for index, block in enumerate(params.layers):
        for path, linear in block.linears().items():
            for name, single in single_linears(path, linear):
                yield f"layers.{index}.{name}", single.kernel.get_value()
    if params.lm_head is not None:
        yield "lm_head", params.lm_head.kernel.get_value()


def settings_of(params: Decoder) -> dict[str, SolverConfig | None]:
    """The settings of each linear by its path, from its kernel; None for float. A grid is symmetric if the run's was: an
    asymmetric one may look so by chance."""
    used: dict[str, SolverConfig | None] = {}
    for path, kernel in kernels_of(params):
        used[path] = None
        if isinstance(kernel, PackedTensor) and params.quantization is not None:
            name = checkpoint_name(path, params.config.model_type)
            asked = resolve(params.quantization, name) or params.quantization.with_rule(None)
            sym = asked.sym and kernel.zeros is None
            used[path] = dataclasses.replace(asked, bits=kernel.bits, group_size=kernel.group_size, sym=sym)
    return used


def layouts_of(params: Decoder, float_dtype: np.dtype) -> dict[str, Layout]:
    """What files hold of each packed kernel, by its path.

    Args:
      params: the decoder.
      float_dtype: of weights in a format that expands them.
    """
    settings = settings_of(params)
    return {
        path: Layout.of(kernel, used, float_dtype, transposed=stored_rule(path, "kernel", params.config.model_type).transposed)
        for path, kernel in kernels_of(params)
        if isinstance(kernel, PackedTensor) and (used := settings[path]) is not None
    }


def config_json(params: Decoder, dtype: np.dtype | None = None) -> dict[str, Any]:
    """The config.json of a decoder without a `quantization_config`.

    A dtype that its tensors were cast to replaces the stated one. That of a quantized decoder names the model that it was made
    from, so that the cards of its copies do.
    """
    stored = str(params.embed_tokens.embedding.get_value().dtype if dtype is None else dtype)
    hf = config_to_hf(params.config, stored) if params.origin is None else json.loads(params.origin.hf_config)
    if params.quantization is not None:
        hf["_name_or_path"] = base_model(params)
    stated = [key for key in ("dtype", "torch_dtype") if key in hf] or ["torch_dtype"]
    return hf if dtype is None else hf | dict.fromkeys(stated, stored)


def write_description(
    folder: PartialFolder,
    params: Decoder,
    format_name: str,
    writer: Writer,
    layouts: Mapping[str, Layout],
    *,
    report: Report | None = None,
    dtype: np.dtype | None = None,
) -> None:
    """Writes config.json and what belongs to it, the model card, and the report; copies the tokenizer's files.

    Args:
      folder: where to.
      params: the decoder.
      format_name: the format, for the card.
      writer: the format's writer.
      layouts: the layout of each packed kernel, by its path.
      report: of the run that made the decoder.
      dtype: what all float tensors were cast to; None where they were not.
    """
    hf = config_json(params, dtype)
    if writer.packs and params.quantization is not None:
        reordered = frozenset(path for path, layout in layouts.items() if layout.reordered)
        written = Written(run=params.quantization, linears=settings_of(params), model=params.config, reordered=reordered)
        quantization = writer.quantization_config(written)
        hf["quantization_config"] = quantization
        if writer.config_file is not None:
            folder.write_text(writer.config_file, json.dumps(quantization, indent=2) + "\n")
        write_card(folder, params, format_name, writer.serving, report)
    folder.write_text("config.json", json.dumps(hf, indent=2) + "\n")
    write_report(folder, report)
    copy_companions(folder, params)


def write_card(folder: PartialFolder, params: Decoder, format_name: str, serving: str, report: Report | None) -> None:
    """Writes the model card of a quantized decoder."""
    folder.write_text(CARD, model_card(params, format_name, serving, settings_of(params), report))


def write_report(folder: PartialFolder, report: Report | None) -> None:
    """Writes the report of the run that made the decoder, where there is one."""
    if report is not None:
        folder.write_text(REPORT, report.to_json() + "\n")


def copy_companions(folder: PartialFolder, params: Decoder) -> None:
    """Copies the tokenizer and generation settings of the folder that a decoder came from."""
    for name in COPIED:
        if params.origin is not None and (Path(params.origin.folder) / name).is_file():
            folder.guard(name, functools.partial(shutil.copyfile, Path(params.origin.folder) / name, folder.folder / name))
