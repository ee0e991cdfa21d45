"""Matrices over K cut into slabs of columns, one a device, and their sums over tokens: no device ever holds all of K x K."""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jgptq.notation import Float, Int
from jgptq.solver.checks import check_k, checked_batch
from jgptq.solver.mesh import axes as sharding

PANEL = 128
"""Rows that travel between devices at once, and that are factored at once."""
_MAX_CHUNK = 1024


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["k", "mesh"])
@dataclasses.dataclass(frozen=True)
class Slabs:
    """A matrix `[K, K]`, extended by rows and columns of zeros so that panels and devices divide it: `values[:k, :k]`.

    Inside of `on_slabs`, `values` are the columns of this device, `[P, C]`.
    """

    values: Float[jax.Array, "P P"]  # columns divided over all devices of the mesh
    k: int  # what is not padding
    mesh: Mesh


class SlabSum(NamedTuple):
    """A running sum of `h h^T` in slabs."""

    slabs: Slabs  # float32
    tokens: Int[jax.Array, ""]  # int32, how many h were summed


_SUMS, _FACTS = ["inputs", "residual_pq", "tokens"], ["k", "width", "mesh"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=_SUMS, meta_fields=_FACTS)
@dataclasses.dataclass(frozen=True)
class SlabDriftSum:
    """`jgptq.solver.statistics.drift.DriftSum` in slabs."""

    inputs: Slabs | None  # the sum of x (x_f - x)^T, float32; None where d holds what the drift of x does to the output
    residual_pq: Float[jax.Array, "P Q"] | None  # that of x d^T, K and D extended by zeros, columns divided over all devices
    tokens: Int[jax.Array, ""]
    k: int  # K
    width: int | None  # D; None where no residual is summed
    mesh: Mesh

    def without_residual(self) -> "SlabDriftSum":
        """The sum over inputs alone."""
        return dataclasses.replace(self, residual_pq=None, width=None)


def padded_size(k: int, mesh: Mesh) -> int:
    """The least size from K on that holds whole panels and equally wide slabs."""
    multiple = math.lcm(PANEL, mesh.size)
    return -(-k // multiple) * multiple


def chunk_rows(size: int, mesh: Mesh, unit: int = PANEL) -> int:
    """Rows that are worked on at once where each chunk is one product: a divisor of `size`, no more than a slab."""
    most = min(_MAX_CHUNK, max(unit, size // mesh.size))
    return max(rows for rows in range(unit, most + 1, unit) if size % rows == 0)


@functools.partial(jax.jit, static_argnames=("k", "mesh"))
def empty(k: int, mesh: Mesh) -> SlabSum:
    """The sum over no tokens, in slabs on a mesh of axes `data` and `model`."""
    sharding.check_axes(mesh)
    size = padded_size(k, mesh)
    return SlabSum(Slabs(_zeros(size, size, mesh), k, mesh), jnp.zeros((), jnp.int32))


@functools.partial(jax.jit, static_argnames=("k", "width", "mesh", "inputs"))
def empty_drift(k: int, width: int | None, mesh: Mesh, *, inputs: bool = True) -> SlabDriftSum:
    """The sums over no tokens, for a linear that adds to a stream of `width`, or to none; of the inputs only where asked."""
    rows = padded_size(k, mesh)
    of_inputs = Slabs(_zeros(rows, rows, mesh), k, mesh) if inputs else None
    residual_pq = None if width is None else _zeros(rows, width + -width % mesh.size, mesh)
    return SlabDriftSum(of_inputs, residual_pq, jnp.zeros((), jnp.int32), k, width, mesh)


def _zeros(rows: int, columns: int, mesh: Mesh) -> jax.Array:
    return jax.lax.with_sharding_constraint(jnp.zeros((rows, columns), jnp.float32), sharding.by_columns(mesh))


@functools.partial(jax.jit, donate_argnames="total")
def accumulate(total: SlabSum, h: Float[jax.Array, "*batch K"]) -> SlabSum:
    """Adds `sum_t h_t h_t^T` over all leading axes of `h`, reduce-scattered over `data`.

    Both halves of the symmetric sum are computed, so that all devices have equally much to do.

    Args:
      total: the sum so far; its memory is reused.
      h: activations `[..., K]`, any float dtype, best divided as `jgptq.solver.mesh.axes.by_tokens` says already.

    Returns:
      The new sum.

    Raises:
      ConfigError: K is not that of the sum.
    """
    slabs = total.slabs
    check_k("activations", h.shape[-1], slabs.k, "the sum")
    h_tk = h.reshape(-1, slabs.k)
    values = _added(slabs.values, h_tk, h_tk, slabs.mesh)
    return SlabSum(dataclasses.replace(slabs, values=values), total.tokens + h_tk.shape[0])


@functools.partial(jax.jit, donate_argnames="total")
def accumulate_drift(
    total: SlabDriftSum,
    h: Float[jax.Array, "*batch K"],
    h_float: Float[jax.Array, "*batch K"] | None,
    lost: Float[jax.Array, "*batch D"] | None,
) -> SlabDriftSum:
    """Adds a batch: `jgptq.solver.statistics.drift.accumulate_drift` in slabs, reduce-scattered over `data`.

    Args, Raises: those of that function; the memory of `total` is reused.
    """
    inputs, residual_pq = total.inputs, total.residual_pq
    checked_batch(h, h_float, lost, k=total.k, inputs=inputs is not None, residual=residual_pq is not None)
    h_tk = h.reshape(-1, total.k)
    if inputs is not None and h_float is not None:
        off_tk = (h_float.astype(jnp.float32) - h.astype(jnp.float32)).astype(h.dtype).reshape(-1, total.k)
        inputs = dataclasses.replace(inputs, values=_added(inputs.values, h_tk, off_tk, total.mesh))
    if residual_pq is not None and lost is not None:
        residual_pq = _added(residual_pq, h_tk, lost.astype(h.dtype).reshape(-1, lost.shape[-1]), total.mesh)
    return dataclasses.replace(total, inputs=inputs, residual_pq=residual_pq, tokens=total.tokens + h_tk.shape[0])


def _added(sum_pq: jax.Array, left_tk: jax.Array, right_td: jax.Array, mesh: Mesh) -> jax.Array:
    """`sum + left^T right`, some rows of the sum at a time.

    Each device has its own tokens, and of these its own features: the columns of the sum over `right` that it adds up, and a part
    of the rows over `left`, of which all parts send some in each step. A device adds up `[rows, Q / model]` over its tokens, and
    is left `[rows, Q / devices]` over all tokens: it needs room for one step.
    """
    size, columns = sum_pq.shape
    ways, parts = mesh.shape[sharding.DATA], mesh.shape[sharding.MODEL]
    step = chunk_rows(size // parts, mesh, unit=1)
    # A token of zeros adds nothing.
    left_tp, right_tq = (
        jnp.pad(part, ((0, -len(part) % ways), (0, wide - part.shape[1])))
        for part, wide in ((left_tk, size), (right_td, columns))
    )

    def local(sum_pc: jax.Array, left_tr: jax.Array, right_tc: jax.Array) -> jax.Array:
        def add(index: jax.Array, sum_mrc: jax.Array) -> jax.Array:
            rows_mts = jax.lax.all_gather(jax.lax.dynamic_slice_in_dim(left_tr, index * step, step, axis=1), sharding.MODEL)
            part_msc = jax.lax.dot_general(
                rows_mts,
                right_tc,
                (((1,), (0,)), ((), ())),
                precision=jax.lax.Precision.HIGHEST,
                preferred_element_type=jnp.float32,
            )
            # Devices first: scattered along a last axis, XLA would transpose the whole slab to meet the result.
            part_dmsc = jnp.moveaxis(part_msc.reshape(parts, step, ways, -1), 2, 0)
            added_msc = jax.lax.psum_scatter(part_dmsc, sharding.DATA, scatter_dimension=0)
            rows_msc = jax.lax.dynamic_slice_in_dim(sum_mrc, index * step, step, axis=1) + added_msc
            return jax.lax.dynamic_update_slice_in_dim(sum_mrc, rows_msc, index * step, axis=1)

        sum_mrc = sum_pc.reshape(parts, size // parts, -1)
        return jax.lax.fori_loop(0, size // parts // step, add, sum_mrc).reshape(sum_pc.shape)

    specs = sharding.COLUMNS, sharding.ACTIVATIONS, sharding.ACTIVATIONS
    return on_slabs(local, mesh, specs, sharding.COLUMNS)(sum_pq, left_tp, right_tq)


def mean(slabs: Slabs, tokens: Int[jax.Array, ""]) -> Slabs:
    """`2/T` times a sum, in the memory of the sum, which is gone; zeros where no token was summed."""
    return dataclasses.replace(slabs, values=_averaged(slabs.values, tokens))


def mean_residual(total: SlabDriftSum) -> Float[jax.Array, "K D"] | None:
    """`2/T` times the sum of `x d^T`, without its padding."""
    if total.residual_pq is None:
        return None
    return _averaged(total.residual_pq, total.tokens)[: total.k, : total.width]


@functools.partial(jax.jit, donate_argnames="values")
def _averaged(values: jax.Array, tokens: jax.Array) -> jax.Array:
    return values * (2.0 / jnp.maximum(tokens, 1).astype(jnp.float32))


def on_slabs(function, mesh: Mesh, in_specs, out_specs):  # type: ignore[no-untyped-def]  # as jax.shard_map
    """`jax.shard_map` without its proof that what leaves as one value is the same on all devices: gathered rows are."""
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


# What follows is called on every device with its own slab, `[P, C]`.


def gathered_rows(slab_pc: Float[jax.Array, "P C"], start: jax.Array | int, size: int) -> Float[jax.Array, "R P"]:
    """Rows of the whole matrix, all columns, on every device."""
    return gathered(jax.lax.dynamic_slice_in_dim(slab_pc, start, size))


def gathered(rows_rc: Float[jax.Array, "R C"]) -> Float[jax.Array, "R P"]:
    """The columns of all devices side by side, on every device."""
    # Devices first: gathered along a last axis, XLA would transpose the whole slab that the rows come from.
    rows_drc = jax.lax.all_gather(rows_rc, sharding.ALL)
    return rows_drc.swapaxes(0, 1).reshape(rows_rc.shape[0], -1)


def own_columns(a_rp: Float[jax.Array, "R P"], width: int) -> Float[jax.Array, "R C"]:
    """Of rows of the whole matrix, the columns that this device holds."""
    return jax.lax.dynamic_slice_in_dim(a_rp, first_column(width), width, axis=-1)


def first_column(width: int) -> jax.Array:
    """Where in the whole matrix the slab of this device begins."""
    return jnp.asarray(jax.lax.axis_index(sharding.ALL), int) * width


def permuted(
    slabs: Slabs, rows_k: Int[jax.Array, " K"], added: Float[jax.Array, ""], memory_pc: Float[jax.Array, "P C"]
) -> Float[jax.Array, "P C"]:
    """This device's columns of `A[rows, :][:, rows] + added I`, written over `memory`, a panel of rows at a time. Padding
    comes last."""
    size, width = slabs.values.shape
    rows_p = jnp.concatenate([rows_k, jnp.arange(slabs.k, size, dtype=rows_k.dtype)])
    columns_c = own_columns(rows_p[None, :], width)[0]
    own_c = first_column(width) + jnp.arange(width)

    def panel(index: jax.Array, out_pc: jax.Array) -> jax.Array:
        start = index * PANEL
        rows_b = jax.lax.dynamic_slice_in_dim(rows_p, start, PANEL)
        all_bp = gathered(slabs.values[rows_b])
        on_diagonal_bc = (start + jnp.arange(PANEL))[:, None] == own_c[None, :]
        out_bc = all_bp[:, columns_c] + jnp.where(on_diagonal_bc, added, 0.0)
        return jax.lax.dynamic_update_slice_in_dim(out_pc, out_bc, start, 0)

    return jax.lax.fori_loop(0, size // PANEL, panel, memory_pc)


def on_all_devices(true: jax.Array) -> jax.Array:
    """Whether a boolean is true on every device."""
    return jax.lax.pmin(true.astype(jnp.int32), sharding.ALL) > 0
