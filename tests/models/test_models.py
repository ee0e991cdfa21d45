"""The decoder against transformers' torch models, and the properties that calibration builds on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from twins import LENGTH, ROWS, TOKENS, decoder_of, logits, logits_of, torch_logits, torch_twin, twin, with_weights

from jgptq.models import RESIDUAL, LayerNorm, Linear, RMSNorm, config_from_hf


@pytest.mark.parametrize("name", ROWS)
def test_logits_are_those_of_transformers(name):
    expected, ours = torch_logits(twin(name)), logits_of(name)
    assert np.std(expected) > 0.5
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [name for name, (_, neutral) in ROWS.items() if neutral])
def test_the_setting_of_a_row_shows_in_the_logits(name):
    hf, neutral = ROWS[name]
    without = with_weights(config_from_hf(hf | neutral), twin(name))
    assert np.max(np.abs(logits(without) - logits_of(name))) > 5e-4  # five times what parity allows


@pytest.mark.parametrize("name", ["llama_every_bias", "llama_tied", "qwen3", "gemma2", "cohere", "granite", "nemotron"])
def test_bfloat16_is_as_near_to_float32_as_transformers_bfloat16(name):
    # Both round to 8 bits, in different places, so neither can be asked for the other's digits. With e the distance of the
    # reference's bfloat16 from its float32 on the same rounded weights, two independent errors of that size are sqrt(2) e apart.
    reference = torch_twin(ROWS[name][0], torch.bfloat16)
    decoder = with_weights(config_from_hf(ROWS[name][0], dtype="bfloat16"), reference)
    low, exact, ours = torch_logits(reference), torch_logits(reference.float()), logits(decoder)
    error = np.std(low - exact)
    assert ours.dtype == np.float32
    assert 0.5 * error < np.std(ours - exact) < 1.5 * error
    assert np.std(ours - low) < 1.75 * error < 0.1 * np.std(exact)
    carry = {RESIDUAL: decoder.embed(jnp.asarray(TOKENS))}
    for block in decoder.layers:
        for stage in block.stages():
            assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(carry))
            carry = block.run(stage, carry)
    assert carry[RESIDUAL].dtype == jnp.bfloat16


def test_a_bfloat16_norm_takes_its_mean_in_float32_as_transformers_does():
    h = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = LlamaRMSNorm(64, 1e-6).bfloat16()(h).detach().float().numpy()
    ours = np.asarray(RMSNorm(64, 1e-6)(jnp.asarray(h.float().numpy(), jnp.bfloat16)).astype(jnp.float32))
    assert np.mean(ours != expected) < 0.01  # bit for bit, but for sums that float32 takes in another order


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
@pytest.mark.parametrize("shape", [64, (2, 64)])
def test_a_norm_starts_neutral_wherever_its_scale_is_measured_from(kind, shape):
    h = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 64)), jnp.float32)
    np.testing.assert_allclose(kind(shape, 1e-6)(h), kind(64, 1e-6, 1.0)(h), rtol=0, atol=1e-6)
    np.testing.assert_allclose(jnp.mean(jnp.square(kind(shape, 1e-6, 1.0)(h)), axis=-1), 1.0, atol=1e-4)


def test_a_block_is_its_stages_and_a_decoder_its_blocks():
    decoder = decoder_of("llama_every_bias")
    residual = decoder.embed(jnp.asarray(TOKENS))
    for block in decoder.layers:
        carry, names = {RESIDUAL: residual}, []
        for stage in block.stages():
            h = block.inputs(stage, carry)
            linears = {name: functools.reduce(getattr, name.split("."), block) for name in stage.linears}
            assert all(linear is block.linears()[name] for name, linear in linears.items())
            carry = block.combine(stage, carry, {name: linear(h) for name, linear in linears.items()})
            names += stage.linears
        every = [".".join(path) for path, module in nnx.iter_modules(block) if isinstance(module, Linear)]
        assert sorted(names) == sorted(every) == sorted(block.linears())
        residual = block(residual)
        assert carry.keys() == {RESIDUAL}
        np.testing.assert_array_equal(carry[RESIDUAL], residual)
    np.testing.assert_array_equal(decoder.logits(residual), decoder(jnp.asarray(TOKENS)))


@pytest.mark.parametrize(("name", "traces"), [("llama", 1), ("qwen2_layer_types", 2)])
def test_blocks_of_one_shape_and_window_share_one_trace(name, traces):
    decoder, traced = decoder_of(name), []

    @jax.jit
    def step(block, residual):
        traced.append(block.self_attn.layer)
        return block(residual)

    start = residual = decoder.embed(jnp.asarray(TOKENS))
    for block in [*decoder.layers, *decoder.layers]:
        residual = step(block, residual)
    assert len(traced) == traces
    np.testing.assert_allclose(step(decoder.layers[1], start), decoder.layers[1](start), rtol=0, atol=1e-4)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, LENGTH - 1), st.integers(0, 2**31))
def test_a_position_sees_itself_and_no_token_after_it(position, seed):
    decoder, other, expected = decoder_of("qwen3"), TOKENS.copy(), logits_of("qwen3")
    other[:, position + 1 :] = np.random.default_rng(seed).integers(0, 61, other[:, position + 1 :].shape)
    np.testing.assert_allclose(logits(decoder, other)[:, : position + 1], expected[:, : position + 1], rtol=0, atol=1e-6)
    other[:, position] = (TOKENS[:, position] + 1) % 61
    assert np.all(np.max(np.abs(logits(decoder, other)[:, position] - expected[:, position]), axis=-1) > 1e-3)


@settings(max_examples=8, deadline=None)
@given(st.integers(8, LENGTH - 1), st.integers(0, 2**31))
def test_a_window_of_w_reaches_back_w_minus_1_positions_a_block_and_no_further(position, seed):
    decoder, other, expected = decoder_of("mistral_window"), TOKENS.copy(), logits_of("mistral_window")
    first = position - len(decoder.layers) * (5 - 1)  # the earliest token that this position sees
    other[:, :first] = np.random.default_rng(seed).integers(0, 61, other[:, :first].shape)
    np.testing.assert_allclose(logits(decoder, other)[:, position:], expected[:, position:], rtol=0, atol=1e-6)
    other[:, first] = (TOKENS[:, first] + 1) % 61
    assert np.all(np.max(np.abs(logits(decoder, other)[:, position] - expected[:, position]), axis=-1) > 1e-4)
