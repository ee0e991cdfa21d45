"""The model card: README.md of a quantized folder, which the hub shows."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jgptq.models import Decoder
from jgptq.run.report import LinearReport, Report
from jgptq.settings.options import options
from jgptq.settings.run import QuantizeConfig
from jgptq.settings.solver import SolverConfig

CARD = "README.md"
_NAME = r"\w[\w.-]*"
_HUB_ID = rf"{_NAME}/{_NAME}"


def model_card(
    params: Decoder,
    format_name: str,
    serving: str,
    linears: Mapping[str, SolverConfig | None],
    report: Report | None,
) -> str:
    """The text of the card: what the folder holds, how it was made, what was lost, how to serve it.

    Args:
      params: a quantized decoder.
      format_name: of the files.
      serving: which programs load the format, in Markdown.
      linears: the settings of each linear by its path; None where it is float.
      report: of the run; None for a decoder that was converted, whose losses are not known.
    """
    config = params.quantization
    if config is None:
        raise ValueError("a model card describes a quantized decoder")
    base, packed = base_model(params), [used for used in linears.values() if used is not None]
    widths = "/".join(map(str, sorted({used.bits for used in packed}))) or str(config.bits)
    kept = len(linears) - len(packed)
    parts = [
        _front_matter(base, format_name),
        f"# {base}, {widths} bit",
        f"The weights of {base}, quantized by jgptq and stored in format `{format_name}`: {len(packed)} linears are packed, "
        f"{kept} stay float. Embeddings and norms are float.",
        "## Settings",
        _table(("option", "value"), _settings_rows(config)),
        *_loss_section(report),
        "## Use",
        serving.strip(),
    ]
    return "\n\n".join(parts) + "\n"


def base_model(params: Decoder) -> str:
    """The name of the model that a decoder was made from: its hub id where that is known, what its config states, else the name
    of its folder."""
    if params.origin is None:
        return params.config.model_type
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+)", params.origin.folder)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    stated = json.loads(params.origin.hf_config).get("_name_or_path")
    known = isinstance(stated, str) and re.fullmatch(rf"{_HUB_ID}|{_NAME}", stated)
    return stated if known else Path(params.origin.folder).resolve().name


def _front_matter(base: str, format_name: str) -> str:
    """What the hub reads of a card: the base model only where it has a hub id."""
    lines = ["library_name: transformers", "pipeline_tag: text-generation"]
    if re.fullmatch(_HUB_ID, base):
        lines += [f"base_model: {base}", "base_model_relation: quantized"]
    return "\n".join(["---", *lines, "tags:", f"- {format_name}", "- jgptq", "---"])


def _settings_rows(config: QuantizeConfig) -> list[tuple[str, str]]:
    """The options of the run, then its rules."""
    rows = [(name, f"`{getattr(config, name)}`") for name in options(QuantizeConfig)]
    rules = [
        (f"rule `{_escaped(rule.pattern)}`", "stays float" if rule.skip else ", ".join(f"{k} `{v}`" for k, v in rule.settings))
        for rule in config.rules
    ]
    return rows + rules


def _loss_section(report: Report | None) -> list[str]:
    """The losses by kind of linear, summed over blocks, against those of round to nearest on the same kind of grid."""
    if report is None:
        return []
    kinds: dict[tuple[str, int | None], list[LinearReport]] = {}
    for row in report.rows:
        kinds.setdefault((re.sub(r"^.*layers\.\d+\.", "", row.name), row.bits), []).append(row)
    rows = [(kind, str(len(same)), _bits(bits), *_losses(same)) for (kind, bits), same in kinds.items()]
    note = "The loss of a linear is tr(dW^T H dW): the squared error of its outputs on the calibration tokens, H = 2/T sum h h^T."
    more = "`quantize_report.json` has a row for each linear."
    header = ("linear", "number", "bits", "loss", "loss of round to nearest", "ratio")
    return ["## Loss", f"{note} {more}", _table(header, rows)]


def _losses(rows: Sequence[LinearReport]) -> tuple[str, str, str]:
    """Sums of both losses and their ratio; dashes where they were not measured."""
    pairs = [(row.loss, row.rtn_loss) for row in rows if row.loss is not None and row.rtn_loss is not None]
    if not pairs or len(pairs) < len(rows):
        return "-", "-", "-"
    loss, nearest = (sum(values) for values in zip(*pairs, strict=True))
    return f"{loss:.4g}", f"{nearest:.4g}", f"{loss / nearest:.3f}" if nearest else "-"


def _bits(bits: int | None) -> str:
    return "float" if bits is None else str(bits)


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _escaped(text: str) -> str:
    """Text for a cell of a table, whose columns are parted by bars."""
    return text.replace("|", r"\|")
