"""The order in which rows of K are quantized."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jgptq.notation import Float, Int


class RowOrder(NamedTuple):
    """Position in the solver's sequence -> row or group of the file. Groups stay whole, so files need no g_idx."""

    rows_k: Int[jax.Array, " K"]
    groups_g: Int[jax.Array, " G"]


def file_order(k: int, group_rows: int) -> RowOrder:
    """Rows as they lie in the file."""
    return RowOrder(jnp.arange(k), jnp.arange(k // group_rows))


def group_order(diag_k: Float[jax.Array, " K"], group_rows: int) -> RowOrder:
    """Most important first, inside each group and among groups.

    A row's importance is its diagonal entry of H; a group's is that of its most important row. Rows that are quantized early have
    the most rows left to compensate them. Unlike the classic act-order, every group keeps its own rows, so that nothing is
    permuted when the model is served.

    Args:
      diag_k: diagonal of the Hessian `[K]`.
      group_rows: rows in a group; divides K.

    Returns:
      The order; ties keep the order of the file.
    """
    diag_gr = diag_k.reshape(-1, group_rows)
    inner_gr = jnp.argsort(-diag_gr, axis=1, stable=True)
    groups_g = jnp.argsort(-jnp.max(diag_gr, axis=1), stable=True)
    rows_gr = inner_gr[groups_g] + groups_g[:, None] * group_rows
    return RowOrder(rows_gr.reshape(-1), groups_g)


def inverse_permutation(order_k: Int[jax.Array, " K"]) -> Int[jax.Array, " K"]:
    """The permutation that undoes one: `inverse[order[i]] == i`."""
    return jnp.zeros_like(order_k).at[order_k].set(jnp.arange(order_k.shape[0], dtype=order_k.dtype))
