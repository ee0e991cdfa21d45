"""Matrices in slabs, read row by row from inside of `on_slabs`: rows travel to every device, never all of them at once."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jgptq.notation import Bool, Float, Int
from jgptq.solver.linalg.cholesky import all_finite
from jgptq.solver.linalg.triangular import product, product_over, transposed
from jgptq.solver.mesh.cholesky import slab_diagonal
from jgptq.solver.mesh.slabs import Slabs, chunk_rows, first_column, gathered, gathered_rows, on_all_devices, permuted
from jgptq.solver.one_device import summed

_MAX_TILE = 2048  # rows of a right-hand side that are updated at once


@dataclasses.dataclass(frozen=True)
class SlabMatrix:
    """`jgptq.solver.placement.Matrix` in slabs. A permutation and damping are applied to rows as they are read."""

    slabs: Slabs
    rows_k: Int[jax.Array, " K"] | None = None
    added: Float[jax.Array, ""] | None = None

    @property
    def k(self) -> int:
        """K."""
        return self.slabs.k

    @property
    def dtype(self) -> jnp.dtype:
        """Of its entries."""
        return self.slabs.values.dtype

    def permuted(self, rows_k: Int[jax.Array, " K"]) -> "SlabMatrix":
        """With rows and columns put into a sequence."""
        return dataclasses.replace(self, rows_k=rows_k)

    def damped(self, added: Float[jax.Array, ""]) -> "SlabMatrix":
        """With this added to its diagonal."""
        return dataclasses.replace(self, added=added)

    def diagonal(self) -> Float[jax.Array, " K"]:
        """The diagonal of the matrix in file order, on every device."""
        return slab_diagonal(self.slabs.values)[: self.k]

    def examined(self) -> tuple[Bool[jax.Array, ""], Bool[jax.Array, ""]]:
        """Whether it is finite. It is symmetric: slabs are summed as `h^T h`, and nothing could make them differ from their
        mirror image."""
        return self.finite(), jnp.bool_(True)

    def finite(self) -> Bool[jax.Array, ""]:
        """Whether the slabs of all devices hold neither NaN nor infinity."""
        return on_all_devices(all_finite(self.slabs.values))

    def rows(self, start: jax.Array | int, size: int) -> Float[jax.Array, "R K"]:
        """Rows from `start` on, gathered."""
        values = self.slabs.values
        if self.rows_k is None:
            rows_rk = gathered_rows(values, start, size)[:, : self.k]
        else:
            rows_rk = gathered(values[jax.lax.dynamic_slice_in_dim(self.rows_k, start, size)])[:, self.rows_k]
        if self.added is None:
            return rows_rk
        on_diagonal_rk = (start + jnp.arange(size))[:, None] == jnp.arange(self.k)[None, :]
        return rows_rk + jnp.where(on_diagonal_rk, self.added, 0.0)

    def times(self, b_rn: Float[jax.Array, "R N"], start: jax.Array | int = 0) -> Float[jax.Array, "R N"]:
        """`A[start:start+R, start:start+R] B`."""
        size = b_rn.shape[0]

        def add(rows_sk: jax.Array, at: jax.Array, out_rn: jax.Array) -> jax.Array:
            part_sr = jax.lax.dynamic_slice_in_dim(rows_sk, start, size, axis=1)
            return jax.lax.dynamic_update_slice_in_dim(out_rn, product(part_sr, b_rn), at, 0)

        return self._over_chunks(add, start, size, jnp.zeros_like(b_rn))

    def columns_times(self, b_rn: Float[jax.Array, "R N"], start: jax.Array | int) -> Float[jax.Array, "K N"]:
        """`A[:, start:start+R] B`, from rows, for a symmetric A."""

        def add(rows_sk: jax.Array, at: jax.Array, out_kn: jax.Array) -> jax.Array:
            return out_kn + product(transposed(rows_sk), jax.lax.dynamic_slice_in_dim(b_rn, at, rows_sk.shape[0]))

        zeros_kn = jnp.zeros((self.k, b_rn.shape[1]), b_rn.dtype)
        return self._over_chunks(add, start, b_rn.shape[0], zeros_kn)

    def row_sums(self, start: jax.Array | int, size: int) -> Float[jax.Array, " R"]:
        """The sums of the rows of `A[start:start+R, start:start+R]`."""

        def add(rows_sk: jax.Array, at: jax.Array, out_r: jax.Array) -> jax.Array:
            sums_s = jnp.sum(jax.lax.dynamic_slice_in_dim(rows_sk, start, size, axis=1), axis=1)
            return jax.lax.dynamic_update_slice_in_dim(out_r, sums_s, at, 0)

        return self._over_chunks(add, start, size, jnp.zeros(size, self.dtype))

    def quadratic(self, b_kn: Float[jax.Array, "K N"]) -> Float[jax.Array, " N"]:
        """`b^T A b` of each column of B."""

        def add(rows_sk: jax.Array, at: jax.Array, sum_n: jax.Array) -> jax.Array:
            b_sn = jax.lax.dynamic_slice_in_dim(b_kn, at, rows_sk.shape[0])
            return sum_n + summed(b_sn * product(rows_sk, b_kn))

        return self._over_chunks(add, 0, self.k, jnp.zeros_like(b_kn[0]))

    def own_columns(self) -> tuple[Float[jax.Array, "K C"], Int[jax.Array, " C"]]:
        """The columns that this device holds, of the matrix as permuted."""
        values = self.slabs.values
        width = values.shape[1]
        columns_c = first_column(width) + jnp.arange(width)
        if self.rows_k is None:
            return values[: self.k], columns_c
        zero, memory_pc = jnp.zeros((), self.dtype), jnp.zeros_like(values)
        return permuted(self.slabs, self.rows_k, zero, memory_pc)[: self.k], columns_c

    def with_columns(self, a_kc: Float[jax.Array, "K C"]) -> "SlabMatrix":
        """The matrix that these columns of each device make up."""
        values = jnp.pad(a_kc, ((0, self.slabs.values.shape[0] - self.k), (0, 0)))
        return SlabMatrix(dataclasses.replace(self.slabs, values=values))

    def _over_chunks(
        self, add: Callable[[jax.Array, jax.Array, jax.Array], jax.Array], start: jax.Array | int, size: int, out: jax.Array
    ) -> jax.Array:
        """Folds over rows `[start, start + size)`, a chunk at a time: `add(rows, where the chunk is among them, so far)`."""
        chunk = chunk_rows(size, self.slabs.mesh, unit=1)

        def step(index: jax.Array, out: jax.Array) -> jax.Array:
            return add(self.rows(start + index * chunk, chunk), index * chunk, out)

        return jax.lax.fori_loop(0, size // chunk, step, out)


@dataclasses.dataclass(frozen=True)
class SlabTriangular:
    """`jgptq.solver.placement.Triangular` in slabs: systems are solved block by block, from the inverses of diagonal blocks."""

    slabs: Slabs
    u_cbb: Float[jax.Array, "C B B"]  # L_BB^-T

    def rows(self, start: jax.Array | int, size: int) -> Float[jax.Array, "R K"]:
        """Rows of L from `start` on, gathered."""
        return gathered_rows(self.slabs.values, start, size)[:, : self.slabs.k]

    def solve(self, b_kn: Float[jax.Array, "K N"]) -> Float[jax.Array, "K N"]:
        """`L^-1 B`: from the first block to the last, `x_B = L_BB^-1 (b_B - L_B: x)`, with x before B alone."""
        count, block, _ = self.u_cbb.shape

        def step(index: jax.Array, x_kn: jax.Array) -> jax.Array:
            start = index * block
            l_bk = self.rows(start, block)
            known_bn = product_over(l_bk, x_kn, jnp.int32(0), start, block)
            left_bn = jax.lax.dynamic_slice_in_dim(x_kn, start, block) - known_bn
            u_bb = jax.lax.dynamic_index_in_dim(self.u_cbb, index, keepdims=False)
            return jax.lax.dynamic_update_slice_in_dim(x_kn, product(transposed(u_bb), left_bn), start, 0)

        return jax.lax.fori_loop(0, count, step, b_kn)

    def transposed_solve(self, b_kn: Float[jax.Array, "K N"]) -> Float[jax.Array, "K N"]:
        """`L^-T B`: from the last block to the first, `x_B = L_BB^-T b_B`, and `b -= L_B:^T x_B` in all rows before B."""
        count, block, _ = self.u_cbb.shape
        at_k = jnp.arange(self.slabs.k)
        tile = block * max(blocks for blocks in range(1, _MAX_TILE // block + 1) if count % blocks == 0)

        def step(index: jax.Array, x_kn: jax.Array) -> jax.Array:
            last = count - 1 - index
            start = last * block
            u_bb = jax.lax.dynamic_index_in_dim(self.u_cbb, last, keepdims=False)
            x_bn = product(u_bb, jax.lax.dynamic_slice_in_dim(x_kn, start, block))
            x_kn = jax.lax.dynamic_update_slice_in_dim(x_kn, x_bn, start, 0)
            before_bk = jnp.where(at_k[None, :] < start, self.rows(start, block), 0.0)

            def spread(number: jax.Array, x_kn: jax.Array) -> jax.Array:
                at = number * tile
                l_bt = jax.lax.dynamic_slice_in_dim(before_bk, at, tile, axis=1)
                left_tn = jax.lax.dynamic_slice_in_dim(x_kn, at, tile) - product(transposed(l_bt), x_bn)
                return jax.lax.dynamic_update_slice_in_dim(x_kn, left_tn, at, 0)

            # Tile by tile, in place: one product for all rows would be as large as X.
            return jax.lax.fori_loop(0, -(-start // tile), spread, x_kn)

        return jax.lax.fori_loop(0, count, step, b_kn)

    def inverse_times(self, b_kn: Float[jax.Array, "K N"]) -> Float[jax.Array, "K N"]:
        """`(H + lambda I)^-1 B`."""
        return self.solve(self.transposed_solve(b_kn))
