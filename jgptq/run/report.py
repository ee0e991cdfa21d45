"""What a run reports: a row per linear."""

import dataclasses
import json
import math
from typing import Any

from jgptq.settings.run import QuantizeConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearReport:
    """One linear of the decoder."""

    name: str  # its name in the checkpoint without the "model." prefix
    k: int  # in-features
    n: int  # out-features
    outcome: str  # name of an `Outcome`, or KEPT_FLOAT
    bits: int | None = None  # of a weight; None where it stays float
    note: str = ""  # the diagnosis in words, empty where there is nothing to say
    loss: float | None = None  # tr(dW^T H dW) against the solve's target, before any tuning; None where it was not measured
    rtn_loss: float | None = None  # the same for round-to-nearest on the same kind of grid
    damping: float | None = None  # fraction of the Hessian's mean diagonal that was added
    tokens: int = 0  # calibration tokens in the Hessian
    seconds: float = 0.0  # share of its stage's solve, by out-features; waiting for the Hessian included

    @property
    def quantized(self) -> bool:
        """Whether the linear is packed."""
        return self.outcome != KEPT_FLOAT


KEPT_FLOAT = "KEPT_FLOAT"

ReportRows = tuple[LinearReport, ...]
"""The rows of a block, in the order of its stages."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningReport:
    """How far scales and norms were moved towards the float model's predictions."""

    steps: int
    before: float  # mean divergence of predictions from the float model's, in nats, on held-out calibration batches
    after: float  # the same afterwards
    kept: bool  # False where it did not fall: the model is as it was before


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """A whole run."""

    config: QuantizeConfig
    rows: tuple[LinearReport, ...]
    seconds: float  # wall time of the run, blocks that were already done excluded
    tuning: TuningReport | None = None  # None where nothing was tuned

    @property
    def kept_float(self) -> tuple[LinearReport, ...]:
        """The linears that stayed float."""
        return tuple(row for row in self.rows if not row.quantized)

    @property
    def worse_than_rtn(self) -> tuple[LinearReport, ...]:
        """The linears whose loss is above that of round-to-nearest."""
        return tuple(row for row in self.rows if row.loss is not None and row.rtn_loss is not None and row.loss > row.rtn_loss)

    def to_json(self) -> str:
        """The report as one JSON object."""
        body: dict[str, Any] = {
            "config": dataclasses.asdict(self.config),
            "seconds": self.seconds,
            "tuning": None if self.tuning is None else dataclasses.asdict(self.tuning),
            "linears": [row_to_dict(row) for row in self.rows],
        }
        return json.dumps(body, indent=1)


def row_to_dict(row: LinearReport) -> dict[str, Any]:
    """A row as JSON values; a loss that is not a number is null."""
    fields = dataclasses.asdict(row)
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in fields.items()}
