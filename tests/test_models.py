"""The decoder against transformers' torch models, and the properties that calibration builds on."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from jgptq.errors import ArchitectureError, CheckpointError
from jgptq.models import FAMILIES, Carry, Decoder, Linear, ModelConfig, config_from_hf, config_to_hf
from jgptq.models.rotary import RopeConfig, rotary_tables

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()

LENGTH = 24
TOKENS = np.random.default_rng(0).integers(0, 61, (2, LENGTH)).astype(np.int32)
BASE = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 0.01,
    "rope_theta": 500.0,
}


def hf_dict(model_type: str, **changes) -> dict:
    """A config.json written by hand in the old style: `rope_scaling`, with `rope_theta` beside it."""
    return {"model_type": model_type, **BASE, **changes}


def rope_row(neutral: dict | None, maximum: int = 64, **scaling) -> tuple[dict, dict | None]:
    """A Llama with a rotary scaling, and the scaling that must give other logits."""
    changed = None if neutral is None else {"rope_scaling": neutral or None}
    return hf_dict("llama", max_position_embeddings=maximum, rope_scaling=scaling), changed


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4, "beta_slow": 0.25}
LONG = {"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [1.5 + i for i in range(8)], "type": "longrope"}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
SLIDING = {"use_sliding_window": True, "sliding_window": 5}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"]}

# name: (config.json, keys whose change must show in the logits, lest the row prove nothing)
ROWS: dict[str, tuple[dict, dict | None]] = {
    "llama": (hf_dict("llama", num_key_value_heads=None), {"rope_theta": 10000.0}),
    "llama_gqa": (hf_dict("llama"), {"rms_norm_eps": 1e-6}),
    "llama_tied": (hf_dict("llama", tie_word_embeddings=True), None),
    "llama_attention_bias": (hf_dict("llama", attention_bias=True), None),
    "llama_every_bias": (hf_dict("llama", attention_bias=True, mlp_bias=True), None),
    "llama_head_dim": (hf_dict("llama", head_dim=128), None),
    "gelu": (hf_dict("llama", hidden_act="gelu"), {"hidden_act": "silu"}),
    "gelu_new": (hf_dict("llama", hidden_act="gelu_new"), {"hidden_act": "gelu"}),
    "gelu_pytorch_tanh": (hf_dict("llama", hidden_act="gelu_pytorch_tanh"), {"hidden_act": "gelu"}),
    "relu": (hf_dict("llama", hidden_act="relu"), {"hidden_act": "silu"}),
    "linear": rope_row({}, type="linear", factor=4.0),
    "dynamic_below_maximum": rope_row(None, type="dynamic", factor=4.0),
    "dynamic_above_maximum": rope_row({}, maximum=16, type="dynamic", factor=4.0),
    "yarn": rope_row({}, **YARN),
    "yarn_default_betas": rope_row({}, rope_type="yarn", factor=4.0, original_max_position_embeddings=512),
    "yarn_without_original": rope_row({}, rope_type="yarn", factor=4.0, beta_fast=8),
    "yarn_not_truncated": rope_row(YARN, **YARN, truncate=False),
    "yarn_mscale": rope_row(YARN, **YARN, mscale=2.0, mscale_all_dim=0.5),
    "yarn_mscale_alone": rope_row({}, **YARN, mscale=2.0),
    "yarn_attention_factor": rope_row(YARN, **YARN, attention_factor=1.5),
    "longrope_below_original": rope_row({}, **LONG, original_max_position_embeddings=32),
    "longrope_above_original": rope_row({}, **LONG, original_max_position_embeddings=16),
    "longrope_factor": rope_row({}, **LONG, original_max_position_embeddings=16, factor=32.0),
    "longrope_attention_factor": rope_row({}, **LONG, original_max_position_embeddings=16, attention_factor=1.5),
    "longrope_original_outside": (
        hf_dict("llama", rope_scaling={**LONG, "original_max_position_embeddings": 32}, original_max_position_embeddings=16),
        {"original_max_position_embeddings": 32},
    ),
    "llama3": rope_row({}, rope_type="llama3", **LLAMA3),
    "mistral_full": (hf_dict("mistral", sliding_window=None), None),
    "mistral_window": (hf_dict("mistral", sliding_window=5), {"sliding_window": 6}),
    "mistral_window_head_dim": (hf_dict("mistral", sliding_window=7, head_dim=128), {"sliding_window": None}),
    "qwen2": (hf_dict("qwen2", sliding_window=5), SLIDING | {"max_window_layers": 1}),
    "qwen2_tied": (hf_dict("qwen2", tie_word_embeddings=True), None),
    "qwen2_max_window_layers": (hf_dict("qwen2", **SLIDING, max_window_layers=1), {"max_window_layers": 0}),
    "qwen2_default_window_layers": (hf_dict("qwen2", **SLIDING), {"max_window_layers": 1}),
    "qwen2_layer_types": (hf_dict("qwen2", **SLIDING, **ALTERNATING), {"layer_types": None}),
    "qwen3": (hf_dict("qwen3", head_dim=16), None),
    "qwen3_default_head_dim": (hf_dict("qwen3"), {"rms_norm_eps": 1e-6}),
    "qwen3_attention_bias": (hf_dict("qwen3", head_dim=16, attention_bias=True), None),
    "qwen3_window": (hf_dict("qwen3", head_dim=16, **SLIDING, max_window_layers=1), {"max_window_layers": 2}),
}


def torch_twin(hf: dict, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """transformers' model, with every weight, bias and norm far from its neutral value."""
    config = transformers.AutoConfig.for_model(**json.loads(json.dumps(hf)))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise / 2 if "norm" in name else noise / 2 if name.endswith("bias") else noise / 5)
    return model


def with_weights(config: ModelConfig, model: torch.nn.Module) -> Decoder:
    """A decoder with the weights of a torch model; every leaf is set exactly once."""
    decoder = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    leaves = dict(nnx.to_flat_state(nnx.state(decoder)))
    unset = set(leaves)
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    for name, tensor in state.items():
        module, kind = name.removeprefix("model.").rsplit(".", 1)
        value = tensor.float().numpy()
        if kind == "weight":
            kind = "scale" if module.endswith("norm") else "embedding" if module == "embed_tokens" else "kernel"
            value = value.T if kind == "kernel" else value
        path = tuple(int(part) if part.isdigit() else part for part in (*module.split("."), kind))
        unset.remove(path)
        assert leaves[path].get_value().shape == value.shape, path
        leaves[path].set_value(jnp.asarray(value))
    assert not unset
    nnx.update(decoder, nnx.from_flat_state(list(leaves.items())))
    return decoder


@functools.cache
def twin(name: str) -> torch.nn.Module:
    return torch_twin(ROWS[name][0])


@functools.cache
def decoder_of(name: str) -> Decoder:
    return with_weights(config_from_hf(ROWS[name][0]), twin(name))


@functools.cache
def logits_of(name: str) -> np.ndarray:
    return logits(decoder_of(name))


def torch_logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS.astype(np.int64))).logits.float().numpy()


def logits(decoder: Decoder, tokens: np.ndarray = TOKENS) -> np.ndarray:
    return np.asarray(decoder(jnp.asarray(tokens)))


def torch_windows(config: transformers.PretrainedConfig) -> tuple[int | None, ...]:
    """The window of each block, as transformers' models read their config."""
    window, blocks = getattr(config, "sliding_window", None), config.num_hidden_layers
    types = config.layer_types if config.model_type.startswith("qwen") else ["sliding_attention"] * blocks
    return tuple(window if kind == "sliding_attention" else None for kind in types)


@pytest.mark.parametrize("name", ROWS)
def test_logits_are_those_of_transformers(name):
    expected, found = torch_logits(twin(name)), logits_of(name)
    assert found.dtype == np.float32 and np.std(expected) > 0.5
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [name for name, (_, neutral) in ROWS.items() if neutral])
def test_the_setting_of_a_row_shows_in_the_logits(name):
    hf, neutral = ROWS[name]
    without = with_weights(config_from_hf(hf | neutral), twin(name))
    assert np.max(np.abs(logits(without) - logits_of(name))) > 5e-4  # five times what parity allows


@pytest.mark.parametrize("name", ROWS)
def test_the_forms_that_transformers_writes_read_like_the_old_one(name):
    config, hf = twin(name).config, ROWS[name][0]
    file, plain = json.loads(config.to_json_string()), config.to_dict()
    assert "rope_scaling" not in file and "rope_theta" not in file and "rope_parameters" in file
    old = config_from_hf(hf)
    assert config_from_hf(file) == old and config_from_hf(plain) == old
    assert old.layer_windows == torch_windows(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_silent_config_gets_the_defaults_of_transformers(family):
    silent = {"model_type": family, "num_attention_heads": 32}
    silent |= {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    for extra in ({}, {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, {"use_sliding_window": True, "max_window_layers": 1}):
        config = transformers.AutoConfig.for_model(**json.loads(json.dumps(silent | extra)))
        assert config_from_hf(silent | extra) == config_from_hf(config.to_dict())
        assert config_from_hf(silent | extra).layer_windows == torch_windows(config)


def test_rope_scaling_wins_over_rope_parameters_as_in_transformers():
    both = hf_dict("llama", rope_parameters={"rope_type": "default", "rope_theta": 7.0}, rope_scaling={"type": "linear", "factor": 2.0})
    theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(both)))
    assert config_from_hf(both).rope == config_from_hf(theirs.to_dict()).rope


@pytest.mark.parametrize("name", ["llama_every_bias", "llama_tied", "qwen3"])
def test_bfloat16_is_as_near_to_float32_as_transformers_bfloat16(name):
    # Both round to 8 bits at different places, so neither can be asked for the other's digits. With e the distance of the reference's
    # bfloat16 from float32 on the same (rounded) weights, two independent errors of that size are sqrt(2) e apart.
    reference = torch_twin(ROWS[name][0], torch.bfloat16)
    decoder = with_weights(config_from_hf(ROWS[name][0], dtype="bfloat16"), reference)
    low, exact, found = torch_logits(reference), torch_logits(reference.float()), logits(decoder)
    rms = lambda x: np.sqrt(np.mean(np.square(x)))  # noqa: E731
    error = rms(low - exact)
    assert found.dtype == np.float32
    assert 0.5 * error < rms(found - exact) < 1.25 * error
    assert rms(found - low) < 1.5 * error < 0.1 * rms(exact)
    carry = Carry(decoder.embed(jnp.asarray(TOKENS)))
    for stage in [stage for block in decoder.layers for stage in block.stages()]:
        assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(carry))
        carry = stage(carry)
    assert carry.residual.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"model_type": "gpt2"}, ArchitectureError, ["'gpt2'", *FAMILIES]),
        ({"model_type": None}, ArchitectureError, ["None", *FAMILIES]),
        ({"rope_scaling": {"type": "su"}}, ArchitectureError, ["'su'", "default", "linear", "dynamic", "yarn", "longrope", "llama3"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}}, ArchitectureError, ["partial_rotary_factor"]),
        ({"rope_scaling": {"type": "linear"}}, CheckpointError, ["'linear'", "factor"]),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, CheckpointError, ["low_freq_factor", "high_freq_factor"]),
        ({"rope_scaling": LONG | {"long_factor": [1.0] * 7}}, CheckpointError, ["long_factor", "8", "7"]),
        ({"rope_scaling": LONG | {"short_factor": [1.0] * 9}}, CheckpointError, ["short_factor", "8", "9"]),
        ({"vocab_size": None, "num_hidden_layers": None}, CheckpointError, ["vocab_size", "num_hidden_layers", "llama"]),
        ({"num_key_value_heads": 3}, CheckpointError, ["4", "3", "key-value heads"]),
        ({"hidden_act": "mish"}, ArchitectureError, ["'mish'", "silu", "gelu_pytorch_tanh"]),
        ({"model_type": "qwen2", **SLIDING, "layer_types": ["full_attention"]}, ArchitectureError, ["layer_types", "2"]),
        ({"model_type": "qwen3", **SLIDING, "layer_types": ["linear_attention"] * 2}, ArchitectureError, ["linear_attention"]),
    ],
)
def test_a_config_that_cannot_be_read_says_why(changes, error, words):
    with pytest.raises(error) as caught:
        config_from_hf(hf_dict("llama") | changes)
    assert all(word in str(caught.value) for word in words)


def test_dtype_is_resolved_by_name():
    assert config_from_hf(hf_dict("llama", torch_dtype="bfloat16")).dtype == config_from_hf(hf_dict("llama", dtype="bfloat16")).dtype == "bfloat16"
    assert config_from_hf(hf_dict("llama", torch_dtype="float16")).dtype == config_from_hf(hf_dict("llama")).dtype == "float32"
    assert config_from_hf(hf_dict("llama", torch_dtype="bfloat16"), dtype="float32").compute_dtype == jnp.float32
    with pytest.raises(ArchitectureError, match="'float64' is not known; known are auto, float32, bfloat16"):
        config_from_hf(hf_dict("llama"), dtype="float64")


@st.composite
def configs(draw) -> ModelConfig:
    """Any config that one of the families can have."""
    family = draw(st.sampled_from(list(FAMILIES)))
    heads, kv, blocks = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2])), draw(st.integers(1, 4))
    head_dim, original, number = draw(st.sampled_from([8, 32])), draw(st.sampled_from([8, 32, 512])), st.floats(1.0, 16.0)
    factors = st.tuples(*[number] * (head_dim // 2))
    optional = lambda *keys: {key: draw(st.none() | st.floats(0.5, 2.0)) for key in keys}  # noqa: E731
    rope_type = draw(st.sampled_from(["default", "linear", "dynamic", "yarn", "longrope", "llama3"]))
    rope = {} if rope_type == "default" else {"factor": draw(number)}
    if rope_type == "yarn":
        rope |= optional("attention_factor", "mscale", "mscale_all_dim", "beta_slow") | {"truncate": draw(st.booleans())}
        rope |= {"beta_fast": draw(st.none() | st.floats(4.0, 64.0)), "original_max_position_embeddings": original}
    if rope_type == "longrope":
        rope |= optional("attention_factor") | {"short_factor": draw(factors), "long_factor": draw(factors)}
        rope |= {"factor": draw(st.none() | number), "original_max_position_embeddings": original}
    if rope_type == "llama3":
        rope |= {"low_freq_factor": draw(st.floats(0.5, 1.5)), "high_freq_factor": draw(st.floats(2.0, 8.0))}
        rope |= {"original_max_position_embeddings": original}
    limits = {"rope_theta": draw(st.floats(100.0, 1e6)), "max_position_embeddings": draw(st.sampled_from([8, 32, 512]))}
    window = st.sampled_from([None, 7])
    windows = {"llama": st.just([None] * blocks), "mistral": window.map(lambda w: [w] * blocks)}
    windows = windows.get(family, st.lists(window, min_size=blocks, max_size=blocks))
    bias = draw(st.booleans()) if family in ("llama", "qwen3") else False
    return ModelConfig(
        model_type=family, vocab_size=61, hidden_size=16 * heads * kv, intermediate_size=96, num_hidden_layers=blocks,
        num_attention_heads=heads * kv, num_key_value_heads=kv, head_dim=head_dim, hidden_act=draw(st.sampled_from(["silu", "gelu"])),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5])), rope=RopeConfig(rope_type=rope_type, **limits, **rope),
        tie_word_embeddings=draw(st.booleans()), qkv_bias=bias or family == "qwen2", o_bias=bias, qk_norm=family == "qwen3",
        mlp_bias=family == "llama" and draw(st.booleans()), layer_windows=tuple(draw(windows)),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(configs(), st.sampled_from([6, 40]))
def test_what_config_to_hf_writes_we_and_transformers_read_back(config, length):
    file = json.loads(json.dumps(config_to_hf(config, dtype=config.dtype)))
    assert config_from_hf(file) == config
    theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(file)))
    assert torch_windows(theirs) == config.layer_windows
    assert theirs.architectures == [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    expected = LlamaRotaryEmbedding(theirs)(torch.zeros(1), torch.arange(length)[None])
    for ours, reference in zip(rotary_tables(config.rope, config.head_dim, length), expected, strict=True):
        np.testing.assert_allclose(ours, reference[0], rtol=0, atol=5e-5)


def test_a_block_is_its_stages_and_a_decoder_its_blocks():
    decoder = decoder_of("llama_every_bias")
    residual = decoder.embed(jnp.asarray(TOKENS))
    for block in decoder.layers:
        carry, names = Carry(residual), []
        for stage in block.stages():
            h = stage.inputs(carry)
            linears = [functools.reduce(getattr, name.split("."), block) for name in stage.names]
            assert all(linear is listed for linear, listed in zip(linears, stage.linears, strict=True))
            carry = stage.combine(carry, [linear(h) for linear in linears])
            names += stage.names
        every = [".".join(path) for path, module in nnx.iter_modules(block) if isinstance(module, Linear)]
        assert sorted(names) == sorted(every) and len(names) == 7
        residual = block(residual)
        np.testing.assert_array_equal(carry.residual, residual)
    np.testing.assert_array_equal(decoder.logits(residual), logits(decoder))


@pytest.mark.parametrize(("name", "traces"), [("llama", 1), ("qwen2_layer_types", 2)])
def test_blocks_of_one_shape_and_window_share_one_trace(name, traces):
    decoder, traced = decoder_of(name), []

    @jax.jit
    def step(block, residual):
        traced.append(block.self_attn.window)
        return block(residual)

    start = residual = decoder.embed(jnp.asarray(TOKENS))
    for block in [*decoder.layers, *decoder.layers]:
        residual = step(block, residual)
    assert len(traced) == traces
    np.testing.assert_allclose(step(decoder.layers[1], start), decoder.layers[1](start), rtol=0, atol=1e-4)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, LENGTH - 2), st.integers(0, 2**31))
def test_no_position_sees_the_tokens_after_it(position, seed):
    decoder, other = decoder_of("qwen3"), TOKENS.copy()
    other[:, position + 1 :] = np.random.default_rng(seed).integers(0, 61, other[:, position + 1 :].shape)
    np.testing.assert_allclose(logits(decoder, other)[:, : position + 1], logits_of("qwen3")[:, : position + 1], rtol=0, atol=1e-6)
    other[:, position] = (TOKENS[:, position] + 1) % 61
    assert np.all(np.max(np.abs(logits(decoder, other)[:, position] - logits_of("qwen3")[:, position]), axis=-1) > 1e-3)


@settings(max_examples=8, deadline=None)
@given(st.integers(8, LENGTH - 1), st.integers(0, 2**31))
def test_a_window_of_w_reaches_back_w_minus_1_positions_a_block_and_no_further(position, seed):
    decoder, other = decoder_of("mistral_window"), TOKENS.copy()
    first = position - len(decoder.layers) * (5 - 1)  # the earliest token that this position sees
    other[:, :first] = np.random.default_rng(seed).integers(0, 61, other[:, :first].shape)
    np.testing.assert_allclose(logits(decoder, other)[:, position:], logits_of("mistral_window")[:, position:], rtol=0, atol=1e-6)
    other[:, first] = (TOKENS[:, first] + 1) % 61
    assert np.all(np.max(np.abs(logits(decoder, other)[:, position] - logits_of("mistral_window")[:, position]), axis=-1) > 1e-5)
