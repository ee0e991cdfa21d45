"""The sequence in which rows of K are quantized, and which group of the file each of its groups is."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jgptq.notation import Float, Int
from jgptq.settings.solver import Order


@functools.partial(jax.tree_util.register_dataclass, data_fields=["rows_k", "groups_g"], meta_fields=["order"])
@dataclasses.dataclass(frozen=True)
class Sequence:
    """The rows of K as the solver takes them, in terms of the file.

    Where groups are runs of the sequence, run i is group `groups_g[i]` of the file. With order "static" they are not: the group
    of a row is then that of its place in the file.
    """

    rows_k: Int[jax.Array, " K"]  # position in the sequence -> row of the file
    groups_g: Int[jax.Array, " G"]  # run of the sequence -> group of the file
    order: Order  # the setting that it was made for

    @property
    def places_k(self) -> Int[jax.Array, " K"]:
        """Row of the file -> position in the sequence."""
        return inverse_permutation(self.rows_k)


def row_sequence(order: Order, diag_k: Float[jax.Array, " K"], group_size: int) -> Sequence:
    """The sequence in which rows are quantized. A row's importance is its diagonal entry of H: early rows have most rows left to
    make up for their error.

    "none": as in the file. "group": most important first inside each group, and groups by their most important row, so that
    every group keeps its rows and nothing is permuted when the model is served. "static": most important first over all rows, on
    grids that were fixed in the file's groups beforehand; also free when served. "desc_act", the classic act-order: the same
    sequence, with groups as runs of it, so that the file needs an index of groups and the runtime a permutation.

    Args:
      order: which of them.
      diag_k: diagonal of the Hessian `[K]`.
      group_size: rows in a group; divides K.

    Returns:
      The sequence; ties keep the order of the file.
    """
    k = diag_k.shape[0]
    if order == "none":
        return Sequence(jnp.arange(k), jnp.arange(k // group_size), order)
    if order == "group":
        diag_gr = diag_k.reshape(-1, group_size)
        inner_gr = jnp.argsort(-diag_gr, axis=1, stable=True)
        groups_g = jnp.argsort(-jnp.max(diag_gr, axis=1), stable=True)
        rows_gr = inner_gr[groups_g] + groups_g[:, None] * group_size
        return Sequence(rows_gr.reshape(-1), groups_g, order)
    return Sequence(jnp.argsort(-diag_k, stable=True), jnp.arange(k // group_size), order)


def inverse_permutation(permutation_k: Int[jax.Array, " K"]) -> Int[jax.Array, " K"]:
    """The permutation that undoes one: `inverse[permutation[i]] == i`."""
    places_k = jnp.arange(permutation_k.shape[0], dtype=permutation_k.dtype)
    return jnp.zeros_like(permutation_k).at[permutation_k].set(places_k)


def permuted(a_kk: Float[jax.Array, "K K"], rows_k: Int[jax.Array, " K"]) -> Float[jax.Array, "K K"]:
    """Rows and columns of a matrix over K, both permuted."""
    return a_kk[rows_k[:, None], rows_k[None, :]]
