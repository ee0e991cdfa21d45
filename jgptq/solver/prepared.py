"""What all columns on one Hessian share."""

import dataclasses
import functools
from typing import Any

import jax

from jgptq.notation import Float, Int
from jgptq.solver.codes.sequence import Sequence
from jgptq.solver.placement import Placement

_ARRAYS = ["h_kk", "factor", "u_cbb", "drift_kk", "sequence", "damping", "outcome"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=_ARRAYS, meta_fields=["placement", "pulled"])
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """A Hessian that `prepare` made ready for the columns that read it. Matrices lie where the placement has them."""

    h_kk: Any  # [K, K], undamped, in file order
    factor: Any  # of the damped H, in the solver's sequence, as `placement.triangular` takes it; None where no method reads it
    u_cbb: Float[jax.Array, "C B B"] | None  # L_BB^-T of each block of the loop, `jgptq.solver.codes.compensate`; None with it
    drift_kk: Any  # [K, K], 2/T X^T (X_f - X), in file order; None if the float model is not looked at
    sequence: Sequence
    damping: Float[jax.Array, ""]  # fraction of the mean diagonal that was added
    outcome: Int[jax.Array, ""]  # an `Outcome`
    placement: Placement
    pulled: bool = False  # whether residuals hold X^T X_f W; the drift's product with W is then what H W lacks to it
