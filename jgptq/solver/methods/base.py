"""What a method is: the statistics that it reads, and what it makes of the columns of a kernel."""

from typing import NamedTuple, Protocol

import jax

from jgptq.notation import Float, Int
from jgptq.settings.solver import Order
from jgptq.solver.codes.problem import Quantized
from jgptq.solver.prepared import Prepared


class Statistics(NamedTuple):
    """What a method reads of the calibration tokens, besides the diagonal of the Hessian."""

    factor: bool  # the factor of the damped Hessian
    drift: bool  # C, what the inputs have drifted
    residual: bool  # R, what the residual stream lost
    needs_drift: bool = False  # it does not solve without C

    @property
    def float_model(self) -> bool:
        """Whether the float model's activations are summed as well as the quantized one's."""
        return self.drift or self.residual


DIAGONAL_ALONE = Statistics(factor=False, drift=False, residual=False)
"""For methods without error compensation."""


class Method(Protocol):
    """A way to quantize the columns of a kernel, its settings resolved. A method is one file with one such class, and a line of
    the table in `jgptq.solver.methods`."""

    @property
    def statistics(self) -> Statistics:
        """What it reads."""
        ...

    @property
    def order(self) -> Order:
        """Of the rows."""
        ...

    @property
    def is_nearest(self) -> bool:
        """Whether its codes are those of round-to-nearest itself, the baseline that losses are compared with."""
        ...

    def quantize(
        self, w_kn: Float[jax.Array, "K N"], residual_kn: Float[jax.Array, "K N"] | None, prepared: Prepared
    ) -> Quantized:
        """Codes and grids of a device's own columns.

        Args:
          w_kn: the columns, in file order, in the dtype of the Hessian.
          residual_kn: R for these columns; None where `statistics` do not ask for it, or there is none.
          prepared: with the statistics that the method reads.
        """
        ...

    def outcome(self, prepared: Int[jax.Array, ""]) -> Int[jax.Array, ""]:
        """What happened in a solve, given the `Outcome` of its preparation."""
        ...
