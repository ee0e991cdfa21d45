"""Tables for a terminal."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jgptq.run.report import LinearReport, Report

if TYPE_CHECKING:
    from rich.table import Table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of a comparison: a model in one form."""

    bits: str  # bits of a weight, or the name of a float format
    method: str  # float, RTN or GPTQ
    perplexity: float
    nbytes: int  # bytes of all tensors
    seconds: float  # to quantize


def comparison_table(title: str, variants: Sequence[Variant]) -> Table:
    """A table of variants, with the excess of each perplexity over that of the first row, in percent."""
    from rich.table import Table

    table = Table(title=title)
    for column in ("bits", "method", "perplexity", "over float", "bytes", "seconds"):
        table.add_column(column, justify="left" if column in ("bits", "method") else "right")
    base = variants[0].perplexity
    for variant in variants:
        excess = f"{100 * (variant.perplexity / base - 1):+.2f} %"
        table.add_row(
            variant.bits, variant.method, f"{variant.perplexity:.4f}", excess, f"{variant.nbytes:,}", f"{variant.seconds:.1f}"
        )
    return table


def linear_table(report: Report) -> Table:
    """A row per linear: its loss and that of round-to-nearest, damping, tokens, seconds, and a note."""
    from rich.table import Table

    table = Table(title=f"{report.config.bits} bit, group {report.config.group_size}, {report.config.method}")
    for column in ("linear", "K x N", "bits", "loss", "RTN loss", "ratio", "damping", "tokens", "seconds", "note"):
        table.add_column(column, justify="left" if column in ("linear", "note") else "right")
    for row in report.rows:
        table.add_row(*_cells(row))
    return table


def _cells(row: LinearReport) -> list[str]:
    if not row.quantized:
        return [row.name, f"{row.k} x {row.n}", "", "", "", "", "", "", "", row.note]
    losses = [f"{loss:.4g}" if loss is not None else "" for loss in (row.loss, row.rtn_loss)]
    ratio = f"{row.loss / row.rtn_loss:.3f}" if row.loss is not None and row.rtn_loss else ""
    damping = f"{row.damping:.3g}" if row.damping is not None else ""
    return [
        row.name,
        f"{row.k} x {row.n}",
        f"{row.bits}",
        *losses,
        ratio,
        damping,
        f"{row.tokens}",
        f"{row.seconds:.2f}",
        row.note,
    ]
