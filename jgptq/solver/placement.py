"""What a solve needs to know of where its matrices over K lie: on one device, or in slabs on a mesh.

All that differs between the two is behind these protocols: the sum over tokens, the factor of the damped Hessian, triangular
systems with it, and reading rows of a matrix. The loop, the methods, refinement and losses are written once, for the columns of W
that a device holds.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax

from jgptq.notation import Bool, Float, Int
from jgptq.solver.linalg.cholesky import Factor
from jgptq.solver.statistics.drift import StageSums

if TYPE_CHECKING:
    from jgptq.solver.prepared import Prepared
    from jgptq.solver.solution import Solution


class Means(NamedTuple):
    """Sums over tokens, divided: what `prepare` and `solve_columns` are given. Matrices lie where the placement has them."""

    h_kk: Any  # H = 2/T X^T X
    drift_kk: Any  # C = 2/T X^T (X_f - X), or None
    residual_kn: Float[jax.Array, "K D"] | None  # 2/T X^T D, or None


class RowReader(Protocol):
    """Rows of a matrix over K."""

    def rows(self, start: jax.Array | int, size: int) -> Float[jax.Array, "R K"]:
        """Rows from `start` on, all their columns, on every device."""
        ...


class Matrix(RowReader, Protocol):
    """A matrix over K, read. Products take and give a device's own columns."""

    @property
    def k(self) -> int:
        """Rows, and columns, that are not padding."""
        ...

    @property
    def dtype(self) -> jax.numpy.dtype:
        """Of its entries."""
        ...

    def permuted(self, rows_k: Int[jax.Array, " K"]) -> "Matrix":
        """With rows and columns put into a sequence."""
        ...

    def damped(self, added: Float[jax.Array, ""]) -> "Matrix":
        """With this added to its diagonal; only rows and products are read of the result."""
        ...

    def diagonal(self) -> Float[jax.Array, " K"]:
        """The diagonal."""
        ...

    def examined(self) -> tuple[Bool[jax.Array, ""], Bool[jax.Array, ""]]:
        """Whether it is finite, and whether it equals its transpose up to rounding."""
        ...

    def finite(self) -> Bool[jax.Array, ""]:
        """Whether it holds neither NaN nor infinity."""
        ...

    def times(self, b_rn: Float[jax.Array, "R N"], start: jax.Array | int = 0) -> Float[jax.Array, "R N"]:
        """`A[start:start+R, start:start+R] B`."""
        ...

    def columns_times(self, b_rn: Float[jax.Array, "R N"], start: jax.Array | int) -> Float[jax.Array, "K N"]:
        """`A[:, start:start+R] B`, for a symmetric A."""
        ...

    def row_sums(self, start: jax.Array | int, size: int) -> Float[jax.Array, " R"]:
        """The sums of the rows of `A[start:start+R, start:start+R]`."""
        ...

    def quadratic(self, b_kn: Float[jax.Array, "K N"]) -> Float[jax.Array, " N"]:
        """`b^T A b` of each column of B, for a symmetric A."""
        ...

    def own_columns(self) -> tuple[Float[jax.Array, "K C"], Int[jax.Array, " C"]]:
        """The columns that this device holds, and which those are."""
        ...

    def with_columns(self, a_kc: Float[jax.Array, "K C"]) -> "Matrix":
        """The matrix that `own_columns` of each device make up."""
        ...


class Triangular(RowReader, Protocol):
    """The lower factor L of a damped Hessian, `H + lambda I = L^T L`, in the solver's sequence."""

    def solve(self, b_kn: Float[jax.Array, "K N"]) -> Float[jax.Array, "K N"]:
        """`L^-1 B`, for a device's own columns of B."""
        ...

    def transposed_solve(self, b_kn: Float[jax.Array, "K N"]) -> Float[jax.Array, "K N"]:
        """`L^-T B`."""
        ...

    def inverse_times(self, b_kn: Float[jax.Array, "K N"]) -> Float[jax.Array, "K N"]:
        """`(H + lambda I)^-1 B = L^-1 L^-T B`."""
        ...


class Placement(Protocol):
    """Where matrices over K lie. Hashable: programs are compiled for a placement."""

    @property
    def reuses_sums(self) -> bool:
        """Whether means are written over the sums, so that a program that takes sums should be given their memory."""
        ...

    def empty_sums(self, k: int, width: int | None, *, drift: bool, inputs: bool = True) -> StageSums:
        """The sums over no tokens, of what a linear with K in-features reads.

        Args:
          k: K.
          width: D, of the residual stream that the linear's output is added to; None where it is added to none.
          drift: whether the float model is looked at.
          inputs: whether the drift of the inputs is summed then; not where what it does to the output is in `lost`.
        """
        ...

    def accumulate(
        self,
        total: StageSums,
        h: Float[jax.Array, "*batch K"],
        h_float: Float[jax.Array, "*batch K"] | None = None,
        lost: Float[jax.Array, "*batch D"] | None = None,
    ) -> StageSums:
        """Adds a batch; call it within jit, with `total` donated.

        Args:
          total: the sums so far.
          h: activations of the quantized model.
          h_float: the same of the float model; read where a drift of inputs is summed.
          lost: the float residual stream less the quantized one; read where a linear adds to it.

        Raises:
          ConfigError: K is not that of the sums.
        """
        ...

    def means(self, total: StageSums) -> Means:
        """`2/T` times the sums."""
        ...

    def cast(self, values: Any, dtype: jax.numpy.dtype) -> Any:
        """The matrix in this dtype; not copied where it has that dtype."""
        ...

    def matrix(self, values: Any) -> Matrix:
        """A matrix, to be read.

        Raises:
          ConfigError: it is not square.
        """
        ...

    def factor(self, values: Any, rows_k: Int[jax.Array, " K"], damping: float) -> Factor[Any]:
        """The lower factor of a Hessian in a sequence, with as little damping from `damping` on as makes it finite."""
        ...

    def diagonal_blocks(self, factor: Factor[Any], block: int) -> Float[jax.Array, "C B B"]:
        """The blocks of L along its diagonal."""
        ...

    def triangular(self, values: Any, u_cbb: Float[jax.Array, "C B B"]) -> Triangular:
        """L, to be read; from `Factor.kk`, and `L_BB^-T` of its blocks."""
        ...

    def after(self, value: jax.Array, done: jax.Array) -> jax.Array:
        """The value, unchanged, for what must not begin before `done` is there: collectives that depend on nothing may meet."""
        ...

    def on_matrices(self, function: Callable[..., tuple[Any, Any]], *matrices: Any) -> tuple[Any, Any]:
        """Calls a function of matrices that returns a matrix, or None, and arrays that are the same on every device."""
        ...

    def on_columns(
        self,
        function: Callable[[Any, "Prepared"], "Solution"],
        columns: tuple[Float[jax.Array, "K N"] | None, ...],
        prepared: "Prepared",
    ) -> "Solution":
        """Calls a function on the columns of each device. Outcomes of single devices are not combined."""
        ...
