"""A Hessian cut into slabs of columns, one a device: no device ever holds all of it."""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jgptq.errors import ConfigError
from jgptq.notation import Float, Int
from jgptq.solver.mesh import axes as sharding

PANEL = 128
"""Rows that travel between devices at once, and that are factored at once."""
_MAX_CHUNK = 1024


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["k", "mesh"])
@dataclasses.dataclass(frozen=True)
class Slabs:
    """A matrix `[K, K]`, extended by rows and columns of zeros so that panels and devices divide it: `values[:k, :k]`."""

    values: Float[jax.Array, "P P"]  # float32, columns divided over all devices of the mesh
    k: int  # what is not padding
    mesh: Mesh


class SlabSum(NamedTuple):
    """A running sum of `h h^T` in slabs."""

    slabs: Slabs
    tokens: Int[jax.Array, ""]  # int32, how many h were summed


def padded_size(k: int, mesh: Mesh) -> int:
    """The least size from K on that holds whole panels and equally wide slabs."""
    multiple = math.lcm(PANEL, mesh.size)
    return -(-k // multiple) * multiple


def chunk_rows(size: int, mesh: Mesh) -> int:
    """Rows of a padded matrix that are worked on at once where each chunk is one product: whole panels, no more than a slab."""
    most = min(_MAX_CHUNK, max(PANEL, size // mesh.size))
    return max(rows for rows in range(PANEL, most + 1, PANEL) if size % rows == 0)


@functools.partial(jax.jit, static_argnames=("k", "mesh"))
def empty(k: int, mesh: Mesh) -> SlabSum:
    """The sum over no tokens, in slabs on a mesh of axes `data` and `model`."""
    sharding.check_axes(mesh)
    size = padded_size(k, mesh)
    zeros = jax.lax.with_sharding_constraint(jnp.zeros((size, size), jnp.float32), sharding.by_columns(mesh))
    return SlabSum(Slabs(zeros, k, mesh), jnp.zeros((), jnp.int32))


@functools.partial(jax.jit, donate_argnames="total")
def accumulate(total: SlabSum, h: Float[jax.Array, "*batch K"]) -> SlabSum:
    """Adds `sum_t h_t h_t^T` over all leading axes of `h`, reduce-scattered over `data`.

    Each device takes its own tokens, and a chunk of rows of the sum at a time. It adds up `[chunk, K / model]` over its tokens,
    and is left `[chunk, K / devices]` over all tokens: it needs room for one chunk. Both halves of the symmetric sum are
    computed, so that all devices have equally much to do.

    Args:
      total: the sum so far; its memory is reused.
      h: activations `[..., K]`, any float dtype, best divided over `data` along their first axis already.

    Returns:
      The new sum.

    Raises:
      ConfigError: K is not that of the sum.
    """
    slabs, mesh = total.slabs, total.slabs.mesh
    k = h.shape[-1]
    if k != slabs.k:
        raise ConfigError(f"activations of {k} features cannot be added to the Hessian of {slabs.k}")
    size, ways = slabs.values.shape[0], mesh.shape[sharding.DATA]
    h_tk = h.reshape(-1, k)
    t = h_tk.shape[0]
    # A token of zeros adds nothing.
    h_tk = jnp.pad(h_tk, ((0, -t % ways), (0, size - k)))
    chunk = chunk_rows(size, mesh)
    width = size // mesh.shape[sharding.MODEL]

    def local(sum_kc: jax.Array, h_tk: jax.Array) -> jax.Array:
        mine_tq = jax.lax.dynamic_slice_in_dim(h_tk, jax.lax.axis_index(sharding.MODEL) * width, width, axis=1)

        def add(index: jax.Array, sum_kc: jax.Array) -> jax.Array:
            rows_tr = jax.lax.dynamic_slice_in_dim(h_tk, index * chunk, chunk, axis=1)
            part_rq = jax.lax.dot_general(
                rows_tr,
                mine_tq,
                (((0,), (0,)), ((), ())),
                precision=jax.lax.Precision.HIGHEST,
                preferred_element_type=jnp.float32,
            )
            # Devices first: scattered along a last axis, XLA would transpose the whole slab to meet the result.
            part_drc = part_rq.reshape(chunk, ways, -1).swapaxes(0, 1)
            added_rc = jax.lax.psum_scatter(part_drc, sharding.DATA, scatter_dimension=0)
            sum_rc = jax.lax.dynamic_slice_in_dim(sum_kc, index * chunk, chunk) + added_rc
            return jax.lax.dynamic_update_slice_in_dim(sum_kc, sum_rc, index * chunk, 0)

        return jax.lax.fori_loop(0, size // chunk, add, sum_kc)

    mapped = on_slabs(local, mesh, (sharding.COLUMNS, sharding.TOKENS), sharding.COLUMNS)
    return SlabSum(dataclasses.replace(slabs, values=mapped(slabs.values, h_tk)), total.tokens + t)


def hessian(total: SlabSum) -> Slabs:
    """`2/T` times the sum, in the memory of the sum, which is gone; zeros where no token was summed."""
    return dataclasses.replace(total.slabs, values=_averaged(total.slabs.values, total.tokens))


@functools.partial(jax.jit, donate_argnames="values")
def _averaged(values: jax.Array, tokens: jax.Array) -> jax.Array:
    return values * (2.0 / jnp.maximum(tokens, 1).astype(jnp.float32))


def on_slabs(function, mesh: Mesh, in_specs, out_specs):  # type: ignore[no-untyped-def]  # as jax.shard_map
    """`jax.shard_map`, told not to prove that what leaves as one value is the same on all devices: gathered rows are."""
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


# What follows is called on every device with its own slab, `[K, C]`.


def gathered_rows(slab_kc: Float[jax.Array, "K C"], start: jax.Array, size: int) -> Float[jax.Array, "R K"]:
    """Rows of the whole matrix, all columns, on every device."""
    return gathered(jax.lax.dynamic_slice_in_dim(slab_kc, start, size))


def gathered(rows_rc: Float[jax.Array, "R C"]) -> Float[jax.Array, "R K"]:
    """The columns of all devices side by side, on every device."""
    # Devices first: gathered along a last axis, XLA would transpose the whole slab that the rows come from.
    rows_drc = jax.lax.all_gather(rows_rc, sharding.ALL)
    return rows_drc.swapaxes(0, 1).reshape(rows_rc.shape[0], -1)


def own_columns(a_rk: Float[jax.Array, "R K"], width: int) -> Float[jax.Array, "R C"]:
    """Of rows of the whole matrix, the columns that this device holds."""
    return jax.lax.dynamic_slice_in_dim(a_rk, first_column(width), width, axis=-1)


def first_column(width: int) -> jax.Array:
    """Where in the whole matrix the slab of this device begins."""
    return jax.lax.axis_index(sharding.ALL) * width


def on_all_devices(true: jax.Array) -> jax.Array:
    """Whether a boolean is true on every device."""
    return jax.lax.pmin(true.astype(jnp.int32), sharding.ALL) > 0
