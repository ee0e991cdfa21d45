"""Causal attention in plain JAX."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jgptq.models.layers import softcapped
from jgptq.notation import Float

_CHUNK = 128
_MAX_CHUNKS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scoring:
    """How the products of queries and keys become scores."""

    scale: float  # factor of the products, 1 / sqrt(F) as a rule
    softcap: float | None = None  # a bound that scores approach, see `jgptq.models.layers.softcapped`
    window: int | None = None  # positions that a query sees, itself included; None for all before it


def causal_attention(
    q: Float[jax.Array, "b S H F"],
    k: Float[jax.Array, "b S J F"],
    v: Float[jax.Array, "b S J M"],
    scoring: Scoring,
    bias: Float[np.ndarray, "H S"] | None = None,
) -> Float[jax.Array, "b S H F"]:
    """`softmax(score(q k^T) + bias) v` over the positions up to each query's own; H/J query heads share a key-value head.

    Runs one key-value head of one sample at a time and its queries in chunks, against the keys that some query of the chunk
    sees: so half of the scores are never computed, and those in memory fit a CPU's cache. Scores and sums are float32; the
    division by the sum comes last.

    Args:
      q: queries `[b, S, H, F]`.
      k: keys `[b, S, J, F]`.
      v: values `[b, S, J, M]`; as wide as keys, or not.
      scoring: scale, bound and window of the scores.
      bias: what is added to the scores of a key, `[H, S]`, as `alibi_bias` makes it.

    Returns:
      The heads' outputs `[b, S, H, M]`, in the dtype of `v`.
    """
    return jax.lax.map(lambda row: _one_sample(row[0], row[1], row[2], scoring, bias), (q, k, v))


def alibi_slopes(heads: int) -> Float[np.ndarray, " H"]:
    """The slopes of ALiBi: `2^(-8 i / H)` for head i = 1..H; where H is no power of two, those of the largest power p below it,
    then every other one of 2p."""

    def geometric(count: int) -> np.ndarray:
        return 2.0 ** (-8.0 * np.arange(1, count + 1) / count)

    power = 2 ** math.floor(math.log2(heads))
    return np.concatenate([geometric(power), geometric(2 * power)[::2][: heads - power]]).astype(np.float32)


def alibi_bias(heads: int, length: int, dtype: str = "float32") -> Float[np.ndarray, "H S"]:
    """The bias of ALiBi (arXiv 2108.12409) on the scores of each key: its head's slope times its position.

    The paper subtracts slope times distance. That differs by a number which all keys of a query share, so that the softmax is the
    same.

    Args:
      heads: H.
      length: S.
      dtype: what slopes, positions and their products are rounded to.
    """
    slopes, places = alibi_slopes(heads).astype(jnp.dtype(dtype)), np.arange(length).astype(jnp.dtype(dtype))
    return (slopes[:, None] * places).astype(np.float32)


def _one_sample(
    q: Float[jax.Array, "S H F"],
    k: Float[jax.Array, "S J F"],
    v: Float[jax.Array, "S J F"],
    scoring: Scoring,
    bias: np.ndarray | None,
) -> Float[jax.Array, "S H F"]:
    length, heads, width = q.shape
    shared = k.shape[1]
    q_heads = q.reshape(length, shared, heads // shared, width).transpose(1, 2, 0, 3)
    k_heads, v_heads = k.transpose(1, 0, 2), v.transpose(1, 0, 2)
    shared_bias = None if bias is None else jnp.asarray(bias).reshape(shared, heads // shared, length)
    mixed = jax.lax.map(
        lambda head: _one_head(head[0], head[1], head[2], head[3], scoring), (q_heads, k_heads, v_heads, shared_bias)
    )
    return mixed.transpose(2, 0, 1, 3).reshape(length, heads, v.shape[-1])


def _one_head(
    q: Float[jax.Array, "g S F"],
    k: Float[jax.Array, "S F"],
    v: Float[jax.Array, "S F"],
    bias: Float[jax.Array, "g S"] | None,
    scoring: Scoring,
) -> Float[jax.Array, "g S F"]:
    length = q.shape[1]
    size = max(_CHUNK, -(-length // _MAX_CHUNKS))
    chunks = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        first = 0 if scoring.window is None else max(0, start - scoring.window + 1)
        of_keys = None if bias is None else bias[:, first:stop]
        chunks.append(_chunk(q[:, start:stop], k[first:stop], v[first:stop], of_keys, start - first, scoring))
    return chunks[0] if len(chunks) == 1 else jnp.concatenate(chunks, axis=1)


def _chunk(
    q: Float[jax.Array, "g C F"],
    k: Float[jax.Array, "M F"],
    v: Float[jax.Array, "M F"],
    bias: Float[jax.Array, "g keys"] | None,
    ahead: int,
    scoring: Scoring,
) -> Float[jax.Array, "g C F"]:
    """Attention of consecutive queries, the first of which stands `ahead` positions behind the first key."""
    group, queries, width = q.shape
    products = jnp.matmul(q.reshape(-1, width), k.T, preferred_element_type=jnp.float32)
    scores = softcapped(products * scoring.scale, scoring.softcap)
    distance = jnp.arange(queries)[:, None] + ahead - jnp.arange(k.shape[0])[None, :]
    visible = distance >= 0 if scoring.window is None else (distance >= 0) & (distance < scoring.window)
    scores = scores.reshape(group, queries, -1)
    if bias is not None:
        scores = scores + bias[:, None, :]
    scores = jnp.where(visible[None], scores, -jnp.inf).reshape(group * queries, -1)
    # Every query sees itself, so that its largest score is finite.
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    mixed = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (mixed / jnp.sum(weights, axis=-1, keepdims=True)).astype(v.dtype).reshape(*q.shape[:2], -1)
