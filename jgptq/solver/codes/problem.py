"""The problem that methods with error compensation solve, and what every method gives back."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Self

import jax

from jgptq.errors import ConfigError
from jgptq.notation import Float, Int, UInt8
from jgptq.solver.codes.sequence import Sequence
from jgptq.solver.linalg.cholesky import added_damping
from jgptq.solver.placement import Matrix, Triangular
from jgptq.solver.prepared import Prepared


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What all columns on one Hessian share, for a method that compensates errors."""

    h: Matrix  # undamped, in file order
    diag_k: Float[jax.Array, " K"]  # its diagonal
    added: Float[jax.Array, ""]  # what damping adds to each entry of it
    factor: Triangular  # L of the damped Hessian, in the solver's sequence
    u_cbb: Float[jax.Array, "C B B"]  # L_BB^-T of each block of the loop
    sequence: Sequence
    drift: Matrix | None  # 2/T X^T (X_f - X), in file order
    pulled: bool  # `jgptq.solver.prepared.Prepared.pulled`
    after: Callable[[jax.Array, jax.Array], jax.Array]  # `jgptq.solver.placement.Placement.after`

    @classmethod
    def of(cls, prepared: Prepared) -> Self:
        """The problem of a prepared Hessian, on the device that this is traced for.

        Raises:
          ConfigError: the Hessian has no factor.
        """
        if prepared.factor is None or prepared.u_cbb is None:
            raise ConfigError(
                "the Hessian was prepared for method 'rtn', without a factor; prepare it with the config of this solve"
            )
        placement = prepared.placement
        h = placement.matrix(prepared.h_kk)
        diag_k = h.diagonal()
        return cls(
            h=h,
            diag_k=diag_k,
            added=added_damping(diag_k, prepared.damping),
            factor=placement.triangular(prepared.factor, prepared.u_cbb),
            u_cbb=prepared.u_cbb,
            sequence=prepared.sequence,
            drift=None if prepared.drift_kk is None else placement.matrix(prepared.drift_kk),
            pulled=prepared.pulled,
            after=placement.after,
        )

    def drift_times(self, w_kn: Float[jax.Array, "K N"]) -> Float[jax.Array, "K N"] | None:
        """`C W`, without `2/T X^T X_f W` where residuals hold that; None where no drift is known."""
        if self.pulled:
            return -self.h.times(w_kn)
        return None if self.drift is None else self.drift.times(w_kn)

    def inverse_times(self, b_kn: Float[jax.Array, "K N"]) -> Float[jax.Array, "K N"]:
        """`(H + lambda I)^-1 B`, in file order."""
        return self.factor.inverse_times(b_kn[self.sequence.rows_k])[self.sequence.places_k]


class Quantized(NamedTuple):
    """Codes and grids in file order, and what they are held against."""

    codes_kn: UInt8[jax.Array, "K N"]
    scale_gn: Float[jax.Array, "G N"]  # each exactly a float16
    zero_gn: Float[jax.Array, "G N"]  # integers
    group_k: Int[jax.Array, " K"] | None  # the group of each row; None where groups are runs of rows of the file
    target_kn: Float[jax.Array, "K N"]  # the kernel, as shifted by a drift
    loss_n: Float[jax.Array, " N"] | None  # dW^T H dW against the target; None where it is not known yet
