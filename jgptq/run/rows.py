"""The report rows of a stage's linears."""

import numpy as np

from jgptq.models import Linear
from jgptq.run.report import KEPT_FLOAT, LinearReport
from jgptq.run.tiles import SolvedLinear, SolvedStage
from jgptq.solver import Outcome


def solved_row(name: str, stage: SolvedStage, result: SolvedLinear, note: str, tokens: int, seconds: float) -> LinearReport:
    """The row of a linear that was packed: its share of a solved stage."""
    k, n = result.packed.shape
    outcome = Outcome(int(stage.outcome)).name
    if tokens == 0:
        return LinearReport(name=name, k=k, n=n, outcome=outcome, bits=result.packed.bits, note=note, seconds=seconds)
    loss, rtn_loss = (float(np.asarray(part, np.float64).sum()) for part in (result.loss_n, result.rtn_loss_n))
    damping = float(stage.damping)
    if loss > rtn_loss:
        note = f"{note} The loss is above that of round-to-nearest.".strip()
    return LinearReport(
        name=name,
        k=k,
        n=n,
        outcome=outcome,
        bits=result.packed.bits,
        note=note,
        loss=loss,
        rtn_loss=rtn_loss,
        damping=damping,
        tokens=tokens,
        seconds=seconds,
    )


def kept_row(name: str, linear: Linear, reason: str) -> LinearReport:
    """The row of a linear that stays float."""
    k, n = linear.kernel.get_value().shape
    return LinearReport(name=name, k=k, n=n, outcome=KEPT_FLOAT, note=f"Stays float: {reason}.")
