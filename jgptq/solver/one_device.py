"""The placement on one device: matrices over K are whole."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp

from jgptq.errors import ConfigError
from jgptq.notation import Bool, Float, Int
from jgptq.solver.codes import sequence
from jgptq.solver.linalg import triangular
from jgptq.solver.linalg.cholesky import Factor, all_finite, damped_factor, diagonal, diagonal_blocks
from jgptq.solver.linalg.triangular import backwards, product
from jgptq.solver.placement import Means
from jgptq.solver.statistics.drift import StageSums, accumulate_drift, empty_drift, mean_drift
from jgptq.solver.statistics.hessian import accumulate, empty, hessian

if TYPE_CHECKING:
    from jgptq.solver.prepared import Prepared
    from jgptq.solver.solution import Solution

_PANELS = 8  # of a quadratic form: those below the diagonal mirror those above, and are not multiplied
_LEAST_PANEL = 512  # rows: narrower ones save less than what they take to compile
_LANES = 8


@dataclasses.dataclass(frozen=True)
class WholeMatrix:
    """A matrix that is all on this device."""

    a_kk: Float[jax.Array, "K K"]

    @property
    def k(self) -> int:
        """K."""
        return self.a_kk.shape[0]

    @property
    def dtype(self) -> jnp.dtype:
        """Of its entries."""
        return self.a_kk.dtype

    def permuted(self, rows_k: Int[jax.Array, " K"]) -> "WholeMatrix":
        """With rows and columns put into a sequence."""
        return WholeMatrix(sequence.permuted(self.a_kk, rows_k))

    def damped(self, added: Float[jax.Array, ""]) -> "WholeMatrix":
        """With this added to its diagonal."""
        return WholeMatrix(self.a_kk + added * jnp.eye(self.k, dtype=self.dtype))

    def diagonal(self) -> Float[jax.Array, " K"]:
        """The diagonal."""
        return diagonal(self.a_kk)

    def examined(self) -> tuple[Bool[jax.Array, ""], Bool[jax.Array, ""]]:
        """Whether it is finite, and whether it is symmetric: its products with one vector and those of its transpose then agree,
        and for a matrix that is not symmetric they all but never do."""
        # All positive, so that features of one sign do not cancel out and leave nothing but rounding.
        probe_k = 1.5 + jnp.cos(jnp.arange(self.k, dtype=self.dtype) * 1.618)
        left_k, right_k = self.a_kk @ probe_k, probe_k @ self.a_kk
        symmetric = jnp.max(jnp.abs(left_k - right_k)) <= 1e-3 * jnp.max(jnp.abs(left_k) + jnp.abs(right_k))
        return jnp.all(jnp.isfinite(left_k)), symmetric

    def finite(self) -> Bool[jax.Array, ""]:
        """Whether it holds neither NaN nor infinity."""
        return all_finite(self.a_kk)

    def rows(self, start: jax.Array | int, size: int) -> Float[jax.Array, "R K"]:
        """Rows from `start` on."""
        return jax.lax.dynamic_slice_in_dim(self.a_kk, start, size)

    def times(self, b_rn: Float[jax.Array, "R N"], start: jax.Array | int = 0) -> Float[jax.Array, "R N"]:
        """`A[start:start+R, start:start+R] B`."""
        return product(self._principal(start, b_rn.shape[0]), b_rn)

    def columns_times(self, b_rn: Float[jax.Array, "R N"], start: jax.Array | int) -> Float[jax.Array, "K N"]:
        """`A[:, start:start+R] B`."""
        return product(jax.lax.dynamic_slice_in_dim(self.a_kk, start, b_rn.shape[0], axis=1), b_rn)

    def row_sums(self, start: jax.Array | int, size: int) -> Float[jax.Array, " R"]:
        """The sums of the rows of `A[start:start+R, start:start+R]`."""
        return jnp.sum(self._principal(start, size), axis=1)

    def quadratic(self, b_kn: Float[jax.Array, "K N"]) -> Float[jax.Array, " N"]:
        """`b^T A b` of each column of B, for a symmetric A."""
        sum_n = jnp.zeros((b_kn.shape[1],), b_kn.dtype)
        panels = max(1, min(_PANELS, self.k // _LEAST_PANEL))
        bounds = [self.k * i // panels for i in range(panels + 1)]
        for start, stop in itertools.pairwise(bounds):
            b_pn = b_kn[start:stop]
            half_pn = product(0.5 * self.a_kk[start:stop, start:stop], b_pn)
            if stop < self.k:
                half_pn = half_pn + product(self.a_kk[start:stop, stop:], b_kn[stop:])
            sum_n += summed(b_pn * half_pn)
        return 2.0 * sum_n

    def own_columns(self) -> tuple[Float[jax.Array, "K C"], Int[jax.Array, " C"]]:
        """All columns."""
        return self.a_kk, jnp.arange(self.k)

    def with_columns(self, a_kc: Float[jax.Array, "K C"]) -> "WholeMatrix":
        """The matrix of these columns."""
        return WholeMatrix(a_kc)

    def _principal(self, start: jax.Array | int, size: int) -> jax.Array:
        if size == self.k:
            return self.a_kk
        return jax.lax.dynamic_slice(self.a_kk, (start, start), (size, size))


def summed(a_rn: Float[jax.Array, "R N"]) -> Float[jax.Array, " N"]:
    """The sum over rows, as a product: XLA would fuse a sum with a product before it, and a CPU runs that at a fifth of its
    speed."""
    return product(jnp.ones((_LANES, a_rn.shape[0]), a_rn.dtype), a_rn)[0]


@dataclasses.dataclass(frozen=True)
class WholeTriangular:
    """The lower factor, held as the upper factor R of the Hessian in the reversed sequence: `H + lambda I = R^T R` there."""

    r_kk: Float[jax.Array, "K K"]

    def rows(self, start: jax.Array | int, size: int) -> Float[jax.Array, "R K"]:
        """Rows of L from `start` on."""
        return backwards(jax.lax.dynamic_slice_in_dim(self.r_kk, self.r_kk.shape[0] - size - start, size))

    def solve(self, b_kn: Float[jax.Array, "K N"]) -> Float[jax.Array, "K N"]:
        """`L^-1 B`."""
        return triangular.solve(backwards(self.r_kk), b_kn)

    def transposed_solve(self, b_kn: Float[jax.Array, "K N"]) -> Float[jax.Array, "K N"]:
        """`L^-T B`."""
        return triangular.transposed_solve(backwards(self.r_kk), b_kn)

    def inverse_times(self, b_kn: Float[jax.Array, "K N"]) -> Float[jax.Array, "K N"]:
        """`(H + lambda I)^-1 B`."""
        return triangular.inverse_product(self.r_kk, b_kn[::-1])[::-1]


@dataclasses.dataclass(frozen=True)
class OneDevice:
    """`jgptq.solver.placement.Placement` on one device: matrices are arrays `[K, K]`."""

    reuses_sums: ClassVar[bool] = False

    def empty_sums(self, k: int, width: int | None, *, drift: bool, inputs: bool = True) -> StageSums:
        """The sums over no tokens."""
        return StageSums(empty(k), empty_drift(k, width, inputs=inputs) if drift else None)

    def accumulate(
        self, total: StageSums, h: jax.Array, h_float: jax.Array | None = None, lost: jax.Array | None = None
    ) -> StageSums:
        """Adds a batch."""
        drift = None if total.drift is None else accumulate_drift(total.drift, h, h_float, lost)
        return StageSums(accumulate(total.hessian, h), drift)

    def means(self, total: StageSums) -> Means:
        """`2/T` times the sums."""
        return Means(hessian(total.hessian), *((None, None) if total.drift is None else mean_drift(total.drift)))

    def cast(self, values: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """The matrix in this dtype."""
        return jnp.asarray(values, dtype)

    def matrix(self, values: jax.Array) -> WholeMatrix:
        """A matrix, to be read.

        Raises:
          ConfigError: it is not square.
        """
        if values.ndim != 2 or values.shape[0] != values.shape[1]:
            raise ConfigError(
                f"a matrix over in-features must be square, found {list(values.shape)}; see jgptq.solver.statistics.hessian"
            )
        return WholeMatrix(values)

    def factor(self, values: jax.Array, rows_k: Int[jax.Array, " K"], damping: float) -> Factor[jax.Array]:
        """The upper factor of the Hessian in the reversed sequence."""
        return damped_factor(values, damping, rows_k[::-1])

    def diagonal_blocks(self, factor: Factor[jax.Array], block: int) -> Float[jax.Array, "C B B"]:
        """The blocks of L along its diagonal."""
        return diagonal_blocks(factor.kk, block)[::-1, ::-1, ::-1]

    def triangular(self, values: jax.Array, u_cbb: Float[jax.Array, "C B B"]) -> WholeTriangular:
        """L, to be read."""
        return WholeTriangular(values)

    def after(self, value: jax.Array, done: jax.Array) -> jax.Array:
        """The value."""
        return value

    def on_matrices(self, function: Callable[..., tuple[Any, Any]], *matrices: jax.Array | None) -> tuple[Any, Any]:
        """Calls the function."""
        return function(*matrices)

    def on_columns(
        self,
        function: Callable[[Any, "Prepared"], "Solution"],
        columns: tuple[jax.Array | None, ...],
        prepared: "Prepared",
    ) -> "Solution":
        """Calls the function."""
        return function(columns, prepared)


ONE_DEVICE = OneDevice()
