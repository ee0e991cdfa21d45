"""The order in which rows of K are quantized, and which group each belongs to."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jgptq.notation import Float, Int
from jgptq.settings.solver import Order


class RowOrder(NamedTuple):
    """The solver's sequence of rows, in terms of the file.

    Where groups are runs of the sequence, run i is group `groups_g[i]` of the file. With order "static" they are not: the group
    of a row is then that of its place in the file.
    """

    rows_k: Int[jax.Array, " K"]  # position in the sequence -> row of the file
    groups_g: Int[jax.Array, " G"]  # run of the sequence -> group of the file


def row_order(order: Order, diag_k: Float[jax.Array, " K"], rows: int) -> RowOrder:
    """The sequence in which rows are quantized. A row's importance is its diagonal entry of H: early rows have most rows left to
    make up for their error.

    "none": as in the file. "group": most important first inside each group, and groups by their most important row, so that
    every group keeps its rows and nothing is permuted when the model is served. "static": most important first over all rows, on
    grids that were fixed in the file's groups beforehand; likewise free when served. "desc_act", the classic act-order: the same
    sequence, with groups as runs of it, so that the file needs an index of groups and the runtime a permutation.

    Args:
      order: which of them.
      diag_k: diagonal of the Hessian `[K]`.
      rows: rows in a group; divides K.

    Returns:
      The order; ties keep the order of the file.
    """
    k = diag_k.shape[0]
    if order == "none":
        return RowOrder(jnp.arange(k), jnp.arange(k // rows))
    if order == "group":
        diag_gr = diag_k.reshape(-1, rows)
        inner_gr = jnp.argsort(-diag_gr, axis=1, stable=True)
        groups_g = jnp.argsort(-jnp.max(diag_gr, axis=1), stable=True)
        rows_gr = inner_gr[groups_g] + groups_g[:, None] * rows
        return RowOrder(rows_gr.reshape(-1), groups_g)
    return RowOrder(jnp.argsort(-diag_k, stable=True), jnp.arange(k // rows))


def inverse_permutation(order_k: Int[jax.Array, " K"]) -> Int[jax.Array, " K"]:
    """The permutation that undoes one: `inverse[order[i]] == i`."""
    return jnp.zeros_like(order_k).at[order_k].set(jnp.arange(order_k.shape[0], dtype=order_k.dtype))


def in_sequence(a_kk: Float[jax.Array, "K K"], rows_k: Int[jax.Array, " K"]) -> Float[jax.Array, "K K"]:
    """Rows and columns of a matrix over K, put into a sequence."""
    return a_kk[rows_k[:, None], rows_k[None, :]]
