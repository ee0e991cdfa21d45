"""Tokens on their way to experts and back: who goes where, rows sorted by expert, products of sorted rows.

A token that goes to k experts has k rows. Rows are sorted by expert, and those of an expert fill whole blocks of B rows: the
last block of each ends with padding. So a block has one expert, shapes do not depend on the routing, and padding costs at most
B - 1 rows an expert.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jgptq.models.architecture.experts import ExpertsConfig
from jgptq.notation import Float, Int

_LEAST_ROWS, _MOST_ROWS = 8, 128


class Routing(NamedTuple):
    """Where each token goes; P rows in C blocks."""

    place_tk: Int[jax.Array, "T k"]  # the row of a token for each of its experts
    weight_tk: Float[jax.Array, "T k"]  # the factor of that row's output, float32
    source_p: Int[jax.Array, " P"]  # the token of a row; T where the row is padding
    expert_c: Int[jax.Array, " C"]  # the expert of a block of rows
    rows_e: Int[jax.Array, " E"]  # the tokens of each expert

    @property
    def block(self) -> int:
        """B, rows in a block."""
        return self.source_p.shape[0] // self.expert_c.shape[0]

    @property
    def blocks_e(self) -> Int[jax.Array, " E"]:
        """The blocks of each expert, the last one filled up with padding."""
        return -(-self.rows_e // self.block)

    @property
    def used(self) -> Int[jax.Array, ""]:
        """The blocks that hold rows; those after them are empty."""
        return jnp.sum(self.blocks_e)

    @property
    def rows_c(self) -> Int[jax.Array, " C"]:
        """The rows of each block that are no padding; they come first."""
        blocks_e = self.blocks_e
        before_c = jnp.arange(self.expert_c.shape[0]) - (jnp.cumsum(blocks_e) - blocks_e)[self.expert_c]
        return jnp.clip(self.rows_e[self.expert_c] - before_c * self.block, 0, self.block).astype(jnp.int32)


def everyone(tokens: int, expert: Int[jax.Array, ""], experts: int) -> Routing:
    """The routing that sends every token to one expert, with weight one."""
    expert_tk = jnp.broadcast_to(expert, (tokens, 1)).astype(jnp.int32)
    return arrange(expert_tk, jnp.ones((tokens, 1), jnp.float32), experts)


def choose(
    logits_te: Float[jax.Array, "T E"], config: ExpertsConfig, correction_e: Float[jax.Array, " E"] | None = None
) -> tuple[Int[jax.Array, "T k"], Float[jax.Array, "T k"]]:
    """The experts of each token, best first, and their weights.

    Args:
      logits_te: float32, of the router.
      config: how it chooses.
      correction_e: float32, added to the scores that are compared (arXiv 2412.19437, section 2.1.2); None for none.

    Returns:
      Experts int32 `[T, k]`, and weights float32 `[T, k]`.
    """
    score_te = jax.nn.softmax(logits_te) if config.score == "softmax" else jax.nn.sigmoid(logits_te)
    compared_te = score_te if correction_e is None else score_te + correction_e[None]
    if config.groups > 1:
        compared_te = _of_best_groups(compared_te, config)
    _, expert_tk = jax.lax.top_k(compared_te, config.experts_per_token)
    weight_tk = jnp.take_along_axis(score_te, expert_tk, axis=-1)
    if config.normalized:
        weight_tk = weight_tk / jnp.sum(weight_tk, axis=-1, keepdims=True)
    return expert_tk, weight_tk * jnp.float32(config.weight_scale)


def _of_best_groups(score_te: Float[jax.Array, "T E"], config: ExpertsConfig) -> Float[jax.Array, "T E"]:
    """The scores of experts in the best groups; minus infinity for the others."""
    score_tgj = score_te.reshape(score_te.shape[0], config.groups, -1)
    group_tg = jnp.sum(jax.lax.top_k(score_tgj, config.group_best)[0], axis=-1)
    least_t1 = jax.lax.top_k(group_tg, config.kept_groups)[0][:, -1:]
    return jnp.where((group_tg >= least_t1)[..., None], score_tgj, -jnp.inf).reshape(score_te.shape)


def arrange(expert_tk: Int[jax.Array, "T k"], weight_tk: Float[jax.Array, "T k"], experts: int) -> Routing:
    """The rows of a choice, sorted by expert; those of one expert in the order of the tokens.

    Args:
      expert_tk: int32, the experts of each token, all different.
      weight_tk: float32, their weights.
      experts: E.
    """
    tokens, chosen = expert_tk.shape
    count = tokens * chosen
    block = _block_rows(count, experts)
    expert_a = expert_tk.reshape(-1)
    order_a = jnp.argsort(expert_a, stable=True)
    rows_e = jnp.bincount(expert_a, length=experts).astype(jnp.int32)
    blocks_e = -(-rows_e // block)
    ends_e = jnp.cumsum(blocks_e)
    first_e = (ends_e - blocks_e) * block - (jnp.cumsum(rows_e) - rows_e)  # from the position in the order to the row
    place_a = jnp.zeros(count, jnp.int32).at[order_a].set(jnp.arange(count, dtype=jnp.int32) + first_e[expert_a[order_a]])
    blocks = -(-count // block) + min(experts, count)
    expert_c = jnp.searchsorted(ends_e, jnp.arange(blocks, dtype=jnp.int32), side="right")
    source_p = jnp.full(blocks * block, tokens, jnp.int32).at[place_a].set(jnp.arange(count, dtype=jnp.int32) // chosen)
    return Routing(
        place_tk=place_a.reshape(tokens, chosen),
        weight_tk=weight_tk,
        source_p=source_p,
        expert_c=jnp.minimum(expert_c, experts - 1).astype(jnp.int32),
        rows_e=rows_e,
    )


def dispatch(h: Float[jax.Array, "b S K"], routing: Routing) -> Float[jax.Array, "P K"]:
    """The rows of a batch of activations, sorted by expert; padding is zero."""
    return jnp.take(h.reshape(-1, h.shape[-1]), routing.source_p, axis=0, mode="fill", fill_value=0)


def collect(y_pn: Float[jax.Array, "P N"], routing: Routing) -> Float[jax.Array, "T N"]:
    """The sum of each token's rows, times their weights: in the dtype of the rows, added in float32."""
    parts = jnp.take(y_pn, routing.place_tk, axis=0) * routing.weight_tk[..., None].astype(y_pn.dtype)
    return jnp.sum(parts.astype(jnp.float32), axis=1).astype(y_pn.dtype)


def grouped_product(x_pk: Float[jax.Array, "P K"], w_ekn: Float[jax.Array, "E K N"], routing: Routing) -> Float[jax.Array, "P N"]:
    """`x[p] @ w[expert of p]`: each row times the kernel of its own expert, and of no other; zeros in blocks without rows.

    On a CPU `jax.lax.ragged_dot` multiplies every row with every expert (jax 0.10 and 0.11): there, blocks are multiplied one
    after the other instead.

    Args:
      x_pk: sorted rows.
      w_ekn: a kernel for each expert, in the dtype of the rows.
      routing: of the rows.

    Returns:
      `[P, N]`, in the dtype of `x_pk`, accumulated in float32.
    """
    if jax.default_backend() != "cpu":
        sizes_e = routing.blocks_e * routing.block
        return jax.lax.ragged_dot(x_pk, w_ekn, sizes_e, preferred_element_type=jnp.float32).astype(x_pk.dtype)
    used, n = routing.used, w_ekn.shape[2]

    def one(part: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        x_bk, expert, index = part

        def product() -> jax.Array:
            return jnp.matmul(x_bk, w_ekn[expert], preferred_element_type=jnp.float32).astype(x_bk.dtype)

        return jax.lax.cond(index < used, product, lambda: jnp.zeros((x_bk.shape[0], n), x_bk.dtype))

    blocks = x_pk.reshape(-1, routing.block, x_pk.shape[1])
    return jax.lax.map(one, (blocks, routing.expert_c, jnp.arange(blocks.shape[0]))).reshape(-1, n)


def _block_rows(rows: int, experts: int) -> int:
    """A quarter of what an expert gets on average, as a power of two: padding is then an eighth of all rows."""
    quarter = max(1, rows // (4 * experts))
    return min(_MOST_ROWS, max(_LEAST_ROWS, 1 << (quarter.bit_length() - 1)))
