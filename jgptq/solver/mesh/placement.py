"""The placement on a mesh: matrices over K in slabs of columns, output columns divided over all devices."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jgptq.notation import Float, Int
from jgptq.solver.linalg.cholesky import Factor
from jgptq.solver.mesh import axes as sharding
from jgptq.solver.mesh import slabs
from jgptq.solver.mesh.cholesky import damped_slabs, factor_blocks
from jgptq.solver.mesh.reading import SlabMatrix, SlabTriangular
from jgptq.solver.mesh.slabs import Slabs, on_slabs
from jgptq.solver.placement import Means
from jgptq.solver.prepared import Prepared
from jgptq.solver.solution import Solution
from jgptq.solver.statistics.drift import StageSums

_DIVIDED: dict[str, Any] = {
    "codes_kn": sharding.COLUMNS,
    "scale_gn": sharding.COLUMNS,
    "zero_gn": sharding.COLUMNS,
    "group_k": sharding.WHOLE,
    "loss_n": sharding.VECTOR,
    "rtn_loss_n": sharding.VECTOR,
    "damping": sharding.WHOLE,
    "outcome": sharding.WHOLE,
}


@dataclasses.dataclass(frozen=True)
class OnMesh:
    """`jgptq.solver.placement.Placement` on a mesh: matrices are `Slabs`, and no device holds all of one.

    Raises:
      ConfigError: the axes of the mesh are not those of `jgptq.solver.mesh.axes.make_mesh`.

    Example:
      >>> from jgptq.solver import solve_columns, prepare
      >>> placement = OnMesh(make_mesh(data=2, model=4))
      >>> total = placement.empty_sums(4096, None, drift=False)
      >>> for h in batches:
      ...     total = placement.accumulate(total, h)
      >>> prepared = prepare(placement.means(total).h_kk, config, placement=placement)
      >>> solution = solve_columns(kernel, prepared, config)
    """

    mesh: Mesh
    reuses_sums: ClassVar[bool] = True

    def __post_init__(self) -> None:
        sharding.check_axes(self.mesh)

    def empty_sums(self, k: int, width: int | None, *, drift: bool, inputs: bool = True) -> StageSums:
        """The sums over no tokens, each in slabs."""
        return StageSums(slabs.empty(k, self.mesh), slabs.empty_drift(k, width, self.mesh, inputs=inputs) if drift else None)

    def accumulate(
        self, total: StageSums, h: jax.Array, h_float: jax.Array | None = None, lost: jax.Array | None = None
    ) -> StageSums:
        """Adds a batch."""
        drift = None if total.drift is None else slabs.accumulate_drift(total.drift, h, h_float, lost)
        return StageSums(slabs.accumulate(total.hessian, h), drift)

    def means(self, total: StageSums) -> Means:
        """`2/T` times the sums, written over them: the sums must not be used afterwards."""
        h = slabs.mean(*total.hessian)
        if total.drift is None:
            return Means(h, None, None)
        residual_kn = slabs.mean_residual(total.drift)
        drift = None if total.drift.inputs is None else slabs.mean(total.drift.inputs, total.drift.tokens)
        return Means(h, drift, residual_kn)

    def cast(self, values: Slabs, dtype: jnp.dtype) -> Slabs:
        """The matrix in this dtype."""
        return dataclasses.replace(values, values=jnp.asarray(values.values, dtype))

    def matrix(self, values: Slabs) -> SlabMatrix:
        """A matrix, to be read."""
        return SlabMatrix(values)

    def factor(self, values: Slabs, rows_k: Int[jax.Array, " K"], damping: float) -> Factor[Slabs]:
        """The slabs of L."""
        return damped_slabs(values, rows_k, damping)

    def diagonal_blocks(self, factor: Factor[Slabs], block: int) -> Float[jax.Array, "C B B"]:
        """The blocks of L along its diagonal, on every device."""
        return factor_blocks(factor, block)

    def triangular(self, values: Slabs, u_cbb: Float[jax.Array, "C B B"]) -> SlabTriangular:
        """L, to be read."""
        return SlabTriangular(values, u_cbb)

    def after(self, value: jax.Array, done: jax.Array) -> jax.Array:
        """The value, behind a barrier. On CPUs the value plus a zero that is computed from `done`: there the barrier ends with
        compilation, loops with collectives that do not depend on each other run at once, and their devices meet in the wrong
        one. That costs a copy of the value, which a GPU, where programs run in one order, does not need."""
        if self.mesh.devices.flat[0].platform != "cpu":
            return jax.lax.optimization_barrier((value, done))[0]
        first = done.reshape(-1)[0].astype(jnp.float32)
        return value + (0.0 * jnp.where(jnp.isfinite(first), first, jnp.zeros_like(first))).astype(value.dtype)

    def on_matrices(self, function: Callable[..., tuple[Any, Any]], *matrices: Slabs | None) -> tuple[Any, Any]:
        """Calls the function on every device, with the slabs of its own."""
        return on_slabs(function, self.mesh, sharding.COLUMNS, (sharding.COLUMNS, sharding.WHOLE))(*matrices)

    def on_columns(
        self,
        function: Callable[[Any, Prepared], Solution],
        columns: tuple[jax.Array | None, ...],
        prepared: Prepared,
    ) -> Solution:
        """Calls the function on every device, with its own columns; where devices do not divide N, columns of zeros fill up."""
        n = next(part.shape[1] for part in columns if part is not None)
        wide = jax.tree.map(lambda part_kn: jnp.pad(part_kn, ((0, 0), (0, -n % self.mesh.size))), columns)
        where = jax.tree.map(
            lambda leaf: sharding.COLUMNS if isinstance(leaf, Slabs) else sharding.WHOLE,
            prepared,
            is_leaf=lambda leaf: isinstance(leaf, Slabs),
        )
        solution = on_slabs(function, self.mesh, (sharding.COLUMNS, where), Solution(**_DIVIDED))(wide, prepared)
        divided = solution._replace(group_k=None)
        cut = jax.tree.map(lambda part: part[..., :n] if part.ndim else part, divided)
        return cut._replace(group_k=solution.group_k)
