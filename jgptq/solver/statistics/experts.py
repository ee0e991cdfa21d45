"""Sums over the tokens that were routed to each expert: a Hessian and a drift for each, at once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jgptq.notation import Float, Int


class ExpertSums(NamedTuple):
    """Running sums of `h h^T` and of `h (h_f - h)^T` over the rows of each expert; E may be a part of all experts."""

    hessian_ekk: Float[jax.Array, "E K K"]  # float32
    drift_ekk: Float[jax.Array, "E K K"] | None  # float32; None where no solve looks at the float model
    tokens_e: Float[jax.Array, " E"]  # float32: tokens may count in part


def empty_experts(experts: int, k: int, *, drift: bool) -> ExpertSums:
    """The sums over no tokens."""
    zeros = jnp.zeros((experts, k, k), jnp.float32)
    return ExpertSums(zeros, jnp.zeros_like(zeros) if drift else None, jnp.zeros(experts, jnp.float32))


def accumulate_experts(
    total: ExpertSums,
    h_pk: Float[jax.Array, "P K"],
    h_float_pk: Float[jax.Array, "P K"] | None,
    expert_c: Int[jax.Array, " C"],
    rows_c: Int[jax.Array, " C"],
) -> ExpertSums:
    """Adds rows, block by block: accumulated in float32 (float32 inputs never through TF32).

    Args:
      total: the sums so far.
      h_pk: activations of the quantized model, in blocks of P / C rows.
      h_float_pk: the same of the float model; not read where no drift is summed.
      expert_c: int32, ascending: which of the sums each block adds to. Blocks with a number out of range add to none.
      rows_c: int32, the rows of each block that count, which come first.

    Returns:
      The new sums.
    """
    experts, size = total.tokens_e.shape[0], h_pk.shape[0] // expert_c.shape[0]
    wanted_c = (expert_c >= 0) & (expert_c < experts) & (rows_c > 0)
    first = jnp.argmax(wanted_c)

    def add(index: jax.Array, total: ExpertSums) -> ExpertSums:
        expert = expert_c[index]
        counts_b1 = (jnp.arange(size) < rows_c[index])[:, None]

        def rows(a_pk: jax.Array) -> jax.Array:
            a_bk = jax.lax.dynamic_slice_in_dim(a_pk, index * size, size)
            return jnp.where(counts_b1, a_bk, jnp.zeros((), a_bk.dtype))

        h_bk = rows(h_pk)
        hessian_ekk = total.hessian_ekk.at[expert].add(_outer(h_bk, h_bk))
        drift_ekk = total.drift_ekk
        if drift_ekk is not None and h_float_pk is not None:
            off_bk = rows(h_float_pk).astype(jnp.float32) - h_bk.astype(jnp.float32)
            drift_ekk = drift_ekk.at[expert].add(_outer(h_bk, off_bk.astype(h_bk.dtype)))
        return ExpertSums(hessian_ekk, drift_ekk, total.tokens_e.at[expert].add(rows_c[index].astype(jnp.float32)))

    # Blocks of one expert after the other: those that are wanted follow each other.
    return jax.lax.fori_loop(first, first + jnp.sum(wanted_c), add, total)


def mean_experts(total: ExpertSums) -> tuple[Float[jax.Array, "E K K"], Float[jax.Array, "E K K"] | None]:
    """`2/T` times the sums of each expert: its Hessian and its drift; zeros where no token was summed."""
    factor = 2.0 / jnp.maximum(total.tokens_e, 1.0)[:, None, None]
    return total.hessian_ekk * factor, None if total.drift_ekk is None else total.drift_ekk * factor


def shrunk(total: ExpertSums, layer: ExpertSums, least: Float[jax.Array, ""]) -> ExpertSums:
    """The sums of experts with fewer than m tokens filled up to m with tokens of the mean of all experts.

    With H_e the Hessian of an expert of T tokens and H that of the rows of all experts, the Hessian becomes
    `(1 - a) H_e + a H` with `a = max(0, 1 - T / m)`: a shrinkage that ends where the expert has m tokens of its own.

    Args:
      total: the sums of some experts.
      layer: the sums over all experts of the layer, as one expert: E = 1.
      least: m, float32.
    """
    missing_e = jnp.maximum(least - total.tokens_e, 0.0)
    part_e = (missing_e / jnp.maximum(layer.tokens_e, 1.0))[:, None, None]
    drift = None
    if total.drift_ekk is not None and layer.drift_ekk is not None:
        drift = total.drift_ekk + part_e * layer.drift_ekk
    return ExpertSums(total.hessian_ekk + part_e * layer.hessian_ekk, drift, total.tokens_e + missing_e)


def with_expert(total: ExpertSums, index: Int[jax.Array, ""], other: ExpertSums) -> ExpertSums:
    """The sums with those of one expert replaced by the first of others."""
    return jax.tree.map(lambda mine, its: mine.at[index].set(its[0]), total, other)


def _outer(a_bp: Float[jax.Array, "B P"], b_bq: Float[jax.Array, "B Q"]) -> Float[jax.Array, "P Q"]:
    contract_rows = (((0,), (0,)), ((), ()))
    highest = jax.lax.Precision.HIGHEST
    return jax.lax.dot_general(a_bp, b_bq, contract_rows, precision=highest, preferred_element_type=jnp.float32)
