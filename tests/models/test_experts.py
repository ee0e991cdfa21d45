"""Mixtures of experts: routing, products of sorted rows, and stacks of linears."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from rows.common import hf_dict
from rows.sparse import DEEPSEEK
from sparse import EXPERTS, QWEN3_MOE, textbook_mixture

import jgptq
from jgptq.errors import ArchitectureError, CheckpointError
from jgptq.models import ExpertLinear, config_from_hf
from jgptq.models.memory import to_device
from jgptq.models.mixture.leaves import PackedExperts, PerExpert, stack_parts
from jgptq.models.mixture.mlp import SparseMLP
from jgptq.models.mixture.routing import arrange, collect, dispatch, everyone, grouped_product
from jgptq.models.packed import PackedTensor


def random_routing(tokens: int, experts: int, chosen: int, seed: int):
    random = np.random.default_rng(seed)
    expert_tk = np.argsort(random.normal(size=(tokens, experts)) - np.arange(experts), axis=1)[:, :chosen].astype(np.int32)
    weight_tk = random.uniform(size=(tokens, chosen)).astype(np.float32)
    return expert_tk, weight_tk, arrange(jnp.asarray(expert_tk), jnp.asarray(weight_tk), experts)


CASES = st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**31))


@settings(max_examples=20)
@given(CASES, st.data())
def test_each_row_is_a_token_of_the_expert_of_its_block_and_the_rest_is_padding(case, data):
    tokens, experts, seed = case
    expert_tk, _, routing = random_routing(tokens, experts, data.draw(st.integers(1, experts)), seed)
    np.testing.assert_array_equal(routing.rows_e, np.bincount(expert_tk.reshape(-1), minlength=experts))
    expert_p = np.repeat(np.asarray(routing.expert_c), routing.block)
    source_p = np.asarray(routing.source_p)
    rows = {(int(token), int(expert)) for token, expert in zip(source_p, expert_p, strict=True) if token < tokens}
    assert rows == {(token, int(expert)) for token in range(tokens) for expert in expert_tk[token]}
    np.testing.assert_array_equal(source_p[np.asarray(routing.place_tk)], np.arange(tokens)[:, None] + 0 * expert_tk)
    real_cb = (source_p < tokens).reshape(-1, routing.block)
    np.testing.assert_array_equal(real_cb, np.arange(routing.block) < np.asarray(routing.rows_c)[:, None])


@settings(max_examples=8)
@given(CASES)
def test_each_row_is_multiplied_by_the_kernel_of_its_own_expert(case):
    tokens, experts, seed = case
    expert_tk, weight_tk, routing = random_routing(tokens, experts, min(2, experts), seed)
    random = np.random.default_rng(seed)
    h, w_ekn = random.normal(size=(1, tokens, 8)).astype(np.float32), random.normal(size=(experts, 8, 5)).astype(np.float32)
    y = collect(grouped_product(dispatch(jnp.asarray(h), routing), jnp.asarray(w_ekn), routing), routing)
    expected = sum(
        weight_tk[:, i, None] * np.einsum("tk,tkn->tn", h[0], w_ekn[expert_tk[:, i]]) for i in range(expert_tk.shape[1])
    )
    np.testing.assert_allclose(y, expected, atol=1e-4)


def test_the_product_of_accelerators_is_that_of_a_cpu(monkeypatch: pytest.MonkeyPatch):
    *_, routing = random_routing(30, 5, 2, 0)
    x_pk = dispatch(jax.random.normal(jax.random.key(0), (1, 30, 16)), routing)
    w_ekn = jax.random.normal(jax.random.key(1), (5, 16, 8))
    here = grouped_product(x_pk, w_ekn, routing)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    np.testing.assert_allclose(grouped_product(x_pk, w_ekn, routing), here, atol=1e-4)


def test_everyone_goes_to_one_expert():
    routing = everyone(11, jnp.int32(2), 4)
    np.testing.assert_array_equal(routing.rows_e, [0, 0, 11, 0])
    np.testing.assert_array_equal(np.asarray(routing.source_p)[:11], np.arange(11))


@pytest.mark.parametrize("changes", [{}, {"normalized": False}, {"weight_scale": 2.5, "experts_per_token": 3}])
def test_a_mixture_is_the_textbooks(changes: dict):
    switches = dataclasses.replace(EXPERTS, **changes)
    mlp = SparseMLP(tiny.config(**QWEN3_MOE | {"experts": switches}), rngs=nnx.Rngs(0))
    random = np.random.default_rng(0)
    linears = {"router": mlp.router, "gate": mlp.experts.gate_proj, "up": mlp.experts.up_proj, "down": mlp.experts.down_proj}
    kernels = {
        name: random.normal(size=linear.kernel.get_value().shape).astype(np.float32) / 4 for name, linear in linears.items()
    }
    for name, linear in linears.items():
        linear.kernel.set_value(jnp.asarray(kernels[name]))
    h = jnp.asarray(random.normal(size=(2, 9, 64)), jnp.float32)
    routing = mlp.route(h)
    rows = dispatch(h, routing)
    hidden = mlp.gated([mlp.experts.gate_proj(rows, routing), mlp.experts.up_proj(rows, routing)])
    y = mlp.joined(mlp.experts.down_proj(hidden, routing), routing, jnp.zeros_like(h))
    np.testing.assert_allclose(y.reshape(-1, 64), textbook_mixture(np.asarray(h).reshape(-1, 64), kernels, switches), atol=2e-4)


def test_setting_one_expert_leaves_the_others():
    linear = ExpertLinear(3, 8, 4, rngs=nnx.Rngs(0))
    before = np.asarray(linear.kernel.get_value())
    linear.expert(1).kernel = nnx.Param(np.ones((8, 4), np.float32))
    assert isinstance(linear.kernel.get_value(), PerExpert)
    after = to_device(linear).kernel.get_value()
    np.testing.assert_array_equal(after, np.stack([before[0], np.ones((8, 4)), before[2]]))


def test_packed_experts_of_which_some_have_zero_points_are_stacked_with_zero_points_in_all():
    def packed(sym: bool, **settings) -> PackedTensor:
        params = tiny.decoder(num_hidden_layers=1, layer_windows=(None,))
        quantized, _ = jgptq.quantize(params, method="rtn", group_size=32, sym=sym, **settings)
        return quantized.layers[0].self_attn.q_proj.kernel.get_value()

    parts = (packed(True), packed(False))
    stack = stack_parts(PerExpert(parts))
    assert isinstance(stack, PackedExperts)
    assert stack.shape == (2, 64, 64)
    np.testing.assert_array_equal(stack.dequantize(), np.stack([part.dequantize() for part in parts]))
    with pytest.raises(CheckpointError, match="experts of one layer must have the same bits, group size and shape"):
        stack_parts(PerExpert((parts[0], packed(True, bits=8))))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"model_type": "deepseek_v2", "topk_method": "noaux_tc"},
            ArchitectureError,
            "topk_method 'noaux_tc' is not known; known are greedy, group_limited_greedy",
        ),
        ({"num_experts_per_tok": 9}, CheckpointError, "a token cannot go to 9 of 8 experts; fetch"),
        ({"n_group": 3}, CheckpointError, "3 of 8 experts in 2 of 3 groups"),
        ({"n_group": 2, "topk_group": 3}, CheckpointError, "3 of 8 experts in 3 of 2 groups"),
        ({"topk_group": 1}, CheckpointError, "3 of 8 experts in 1 of 4 groups"),
        ({"n_group": 8, "topk_group": 4}, CheckpointError, "3 of 8 experts in 4 of 8 groups"),  # its score is of its best two
    ],
)
def test_a_config_that_leaves_too_few_experts_to_choose_from_is_refused(changes, error, message):
    hf = hf_dict("deepseek_v3", **DEEPSEEK) | {"n_group": 4, "topk_group": 2}
    assert config_from_hf(hf).experts.groups == 4
    with pytest.raises(error, match=message):
        config_from_hf(hf | changes)


def test_the_number_of_experts_has_two_names():
    named, renamed = (hf_dict("qwen3_moe", **{name: 8}) for name in ("num_experts", "num_local_experts"))
    assert config_from_hf(named) == config_from_hf(renamed)
