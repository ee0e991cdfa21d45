"""The Hessian of a linear's squared output error: `H = 2/T sum_t h_t h_t^T` over calibration tokens (GPTQ, section 3.1)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jgptq.notation import Float, Int
from jgptq.solver.checks import check_k

_PANELS = 4


class HessianSum(NamedTuple):
    """A running sum of `h h^T`, as the tiles on and above the diagonal: `tiles[i][j]` is panel i of K against panel i + j.

    The other half is their mirror image, so that it is neither computed nor kept. Tiles are arrays of their own because a sum
    that is added to a slice of one large array costs a CPU more time than the product that is added.
    """

    tiles: tuple[tuple[Float[jax.Array, "P Q"], ...], ...]  # float32
    tokens: Int[jax.Array, ""]  # int32, how many h were summed


def empty(k: int) -> HessianSum:
    """The sum over no tokens."""
    widths = [stop - start for start, stop in _panels(k)]
    tiles = tuple(tuple(jnp.zeros((p, q), jnp.float32) for q in widths[i:]) for i, p in enumerate(widths))
    return HessianSum(tiles, jnp.zeros((), jnp.int32))


def accumulate(total: HessianSum, h: Float[jax.Array, "*batch K"]) -> HessianSum:
    """Adds `sum_t h_t h_t^T` over all leading axes of `h`, accumulated in float32 (float32 inputs never through TF32).

    Args:
      total: the sum so far.
      h: activations `[..., K]`, any float dtype.

    Returns:
      The new sum.

    Raises:
      ConfigError: K is not that of the sum.
    """
    k = h.shape[-1]
    check_k("activations", k, sum(tile.shape[1] for tile in total.tiles[0]), "the sum")
    # Both operands with tokens as their last axis is the form that is multiplied fastest in bfloat16; without the barrier XLA
    # would fold the transposition back into the products.
    h_kt = jax.lax.optimization_barrier(h.reshape(-1, k).T)
    panels = [h_kt[start:stop] for start, stop in _panels(k)]
    tiles = tuple(
        tuple(tile + _outer(panels[i], panels[i + j]) for j, tile in enumerate(row)) for i, row in enumerate(total.tiles)
    )
    return HessianSum(tiles, total.tokens + h_kt.shape[1])


def hessian(total: HessianSum) -> Float[jax.Array, "K K"]:
    """`2/T` times the mirrored sum, float32 `[K, K]`; zeros where no token was summed."""
    rows = []
    for i in range(len(total.tiles)):
        mirrored = [total.tiles[j][i - j].T for j in range(i)]
        rows.append(jnp.concatenate([*mirrored, *total.tiles[i]], axis=1))
    return jnp.concatenate(rows, axis=0) * (2.0 / jnp.maximum(total.tokens, 1).astype(jnp.float32))


def _outer(a_pt: Float[jax.Array, "P T"], b_qt: Float[jax.Array, "Q T"]) -> Float[jax.Array, "P Q"]:
    contract_tokens = (((1,), (1,)), ((), ()))
    highest = jax.lax.Precision.HIGHEST
    return jax.lax.dot_general(a_pt, b_qt, contract_tokens, precision=highest, preferred_element_type=jnp.float32)


def _panels(k: int) -> list[tuple[int, int]]:
    """Where each panel of K begins and ends."""
    width = -(-k // _PANELS)
    return [(start, min(start + width, k)) for start in range(0, k, width)]
