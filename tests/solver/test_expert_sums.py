"""Sums over the rows of each expert, against sums over one expert at a time."""

import jax.numpy as jnp
import numpy as np
import pytest

from jgptq.solver.statistics.experts import ExpertSums, accumulate_experts, empty_experts, mean_experts, shrunk, with_expert

K, BLOCK = 8, 4
EXPERT_C = np.array([0, 0, 1, 3, 3, 4, 4], np.int32)  # none goes to expert 2, and the last block is empty
ROWS_C = np.array([4, 2, 1, 4, 3, 2, 0], np.int32)


def rows(seed: int) -> np.ndarray:
    """Blocks of rows; what stands in padding is not zero."""
    return np.random.default_rng(seed).normal(size=(len(EXPERT_C) * BLOCK, K)).astype(np.float32)


def of_expert(h_pk: np.ndarray, expert: int) -> np.ndarray:
    """The rows of one expert, without padding."""
    blocks = h_pk.reshape(-1, BLOCK, K)
    mine = [blocks[c, : ROWS_C[c]] for c in range(len(EXPERT_C)) if EXPERT_C[c] == expert]
    return np.concatenate(mine) if mine else np.zeros((0, K), np.float32)


def summed(first: int, experts: int, *, drift: bool) -> ExpertSums:
    """Two batches, added to the sums of experts from `first` on."""
    total = empty_experts(experts, K, drift=drift)
    for seed in (0, 1):
        h_float = jnp.asarray(rows(seed + 2)) if drift else None
        total = accumulate_experts(total, jnp.asarray(rows(seed)), h_float, jnp.asarray(EXPERT_C - first), jnp.asarray(ROWS_C))
    return total


@pytest.mark.parametrize(("first", "experts"), [(0, 5), (1, 3), (2, 1), (4, 1)])
def test_each_sum_is_that_of_the_experts_own_rows(first: int, experts: int):
    h_ekk, drift_ekk = mean_experts(total := summed(first, experts, drift=True))
    assert drift_ekk is not None
    for index in range(experts):
        x, x_float = (np.concatenate([of_expert(rows(seed + of), first + index) for seed in (0, 1)]) for of in (0, 2))
        assert total.tokens_e[index] == len(x)
        np.testing.assert_allclose(h_ekk[index], 2 / max(len(x), 1) * x.T @ x, atol=1e-5)
        np.testing.assert_allclose(drift_ekk[index], 2 / max(len(x), 1) * x.T @ (x_float - x), atol=1e-5)


def test_a_starved_expert_moves_towards_the_mean_as_far_as_it_lacks_tokens():
    total, layer = summed(0, 5, drift=True), summed(0, 5, drift=True)
    whole = ExpertSums(*(jnp.sum(part, axis=0, keepdims=True) for part in layer))
    least = 10.0
    tokens_e = np.asarray(total.tokens_e)
    own_e = np.minimum(1, tokens_e / least)
    for mixed, own, mean in zip(
        mean_experts(shrunk(total, whole, jnp.float32(least))), mean_experts(total), mean_experts(whole), strict=True
    ):
        expected = own_e[:, None, None] * np.asarray(own) + (1 - own_e)[:, None, None] * np.asarray(mean)
        np.testing.assert_allclose(mixed, expected, atol=1e-5)
    assert 0 < np.sum(own_e < 1) < 5


def test_one_expert_is_replaced_and_no_other():
    total, other = summed(0, 5, drift=False), summed(4, 1, drift=False)
    replaced = with_expert(total, jnp.int32(2), other)
    np.testing.assert_array_equal(replaced.hessian_ekk[2], other.hessian_ekk[0])
    np.testing.assert_array_equal(replaced.tokens_e, total.tokens_e.at[2].set(other.tokens_e[0]))
