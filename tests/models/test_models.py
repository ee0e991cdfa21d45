"""The decoder against transformers' torch models, and the properties that calibration builds on."""

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
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from jgptq.errors import ArchitectureError, CheckpointError
from jgptq.models import FAMILIES, Carry, Decoder, Linear, ModelConfig, RMSNorm, config_from_hf, config_to_hf
from jgptq.models.rotary import RopeConfig, rotary_tables

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()

LENGTH = 24
TOKENS = np.random.default_rng(0).integers(0, 61, (2, LENGTH)).astype(np.int32)
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
SIZES = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
BASE = {**SIZES, **HEADS, "max_position_embeddings": 64, "rms_norm_eps": 0.01, "rope_theta": 500.0}


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
ROPE_TYPES = ["default", "linear", "dynamic", "yarn", "longrope", "llama3"]
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
    "yarn_not_truncated": rope_row(YARN, **YARN, truncate=False),
    "yarn_mscale": rope_row(YARN, **YARN, mscale=2.0, mscale_all_dim=0.5),
    "yarn_mscale_alone": rope_row({}, **YARN, mscale=2.0),
    "yarn_attention_factor": rope_row(YARN, **YARN, attention_factor=1.5),
    "longrope_below_original": rope_row({}, **LONG, original_max_position_embeddings=32),
    "longrope_above_original": rope_row({}, **LONG, original_max_position_embeddings=16),
    "longrope_factor": rope_row({}, **LONG, original_max_position_embeddings=16, factor=8.0),
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


def torch_config(hf: dict) -> transformers.PretrainedConfig:
    return transformers.AutoConfig.for_model(**json.loads(json.dumps(hf)))  # it changes the dicts that it is given


def torch_twin(hf: dict, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """transformers' model, with every weight, bias and norm far from its neutral value."""
    kind = transformers.AutoModelForCausalLM
    model = kind.from_config(torch_config(hf), dtype=dtype, attn_implementation="eager").eval()
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
    return np.asarray(forward(decoder, jnp.asarray(tokens)))


forward = jax.jit(lambda decoder, tokens: decoder(tokens))


def torch_windows(config: transformers.PretrainedConfig) -> tuple[int | None, ...]:
    """The window of each block, as transformers' models read their config."""
    window, blocks = getattr(config, "sliding_window", None), config.num_hidden_layers
    types = config.layer_types if config.model_type.startswith("qwen") else ["sliding_attention"] * blocks
    return tuple(window if kind == "sliding_attention" else None for kind in types)


@pytest.mark.parametrize("name", ROWS)
def test_logits_are_those_of_transformers(name):
    expected, found = torch_logits(twin(name)), logits_of(name)
    assert np.std(expected) > 0.5
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [name for name, (_, neutral) in ROWS.items() if neutral])
def test_the_setting_of_a_row_shows_in_the_logits(name):
    hf, neutral = ROWS[name]
    without = with_weights(config_from_hf(hf | neutral), twin(name))
    assert np.max(np.abs(logits(without) - logits_of(name))) > 5e-4  # five times what parity allows


@pytest.mark.parametrize("name", ROWS)
def test_the_forms_that_transformers_writes_read_like_the_old_one(name):
    config, old = twin(name).config, config_from_hf(ROWS[name][0])
    file = json.loads(config.to_json_string())  # what save_pretrained writes
    assert not {"rope_scaling", "rope_theta"} & file.keys()
    assert config_from_hf(file) == old
    assert config_from_hf(config.to_dict()) == old
    assert torch_windows(config) == old.layer_windows


@pytest.mark.parametrize("family", FAMILIES)
def test_a_silent_config_gets_the_defaults_of_transformers(family):
    silent = {"model_type": family, **SIZES, "num_attention_heads": 32}
    yarn, windows = {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, {"use_sliding_window": True, "max_window_layers": 1}
    for hf in (silent, silent | yarn, silent | windows):
        config, found = torch_config(hf), config_from_hf(hf)
        assert found == config_from_hf(config.to_dict())
        assert found.layer_windows == torch_windows(config)


def test_rope_scaling_wins_over_rope_parameters_as_in_transformers():
    both = hf_dict("llama", rope_parameters={"rope_theta": 7.0}, rope_scaling={"type": "linear", "factor": 2.0})
    theirs = torch_config(both).rope_parameters
    assert config_from_hf(both).rope.rope_type == theirs["rope_type"] == "linear"
    assert config_from_hf(both).rope.rope_theta == theirs["rope_theta"]


@pytest.mark.parametrize("name", ["llama_every_bias", "llama_tied", "qwen3"])
def test_bfloat16_is_as_near_to_float32_as_transformers_bfloat16(name):
    # Both round to 8 bits, in different places, so neither can be asked for the other's digits. With e the distance of the
    # reference's bfloat16 from its float32 on the same rounded weights, two independent errors of that size are sqrt(2) e apart.
    reference = torch_twin(ROWS[name][0], torch.bfloat16)
    decoder = with_weights(config_from_hf(ROWS[name][0], dtype="bfloat16"), reference)
    low, exact, found = torch_logits(reference), torch_logits(reference.float()), logits(decoder)
    error = np.std(low - exact)
    assert found.dtype == np.float32
    assert 0.5 * error < np.std(found - exact) < 1.5 * error
    assert np.std(found - low) < 1.75 * error < 0.1 * np.std(exact)
    carry = Carry(decoder.embed(jnp.asarray(TOKENS)))
    for stage in [stage for block in decoder.layers for stage in block.stages()]:
        assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(carry))
        carry = stage(carry)
    assert carry.residual.dtype == jnp.bfloat16


def test_a_bfloat16_norm_takes_its_mean_in_float32_as_transformers_does():
    h = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = LlamaRMSNorm(64, 1e-6).bfloat16()(h).detach().float().numpy()
    found = np.asarray(RMSNorm(64, 1e-6)(jnp.asarray(h.float().numpy(), jnp.bfloat16)).astype(jnp.float32))
    assert np.mean(found != expected) < 0.01  # bit for bit, but for sums that float32 takes in another order


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"model_type": "gpt2"}, ArchitectureError, ["'gpt2'", *FAMILIES]),
        ({"model_type": None}, ArchitectureError, ["None", *FAMILIES]),
        ({"rope_scaling": {"type": "su"}}, ArchitectureError, ["'su'", *ROPE_TYPES]),
        ({"partial_rotary_factor": 0.5}, ArchitectureError, ["partial_rotary_factor"]),
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


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(("stored", "computed"), [("bfloat16", "bfloat16"), ("float16", "float32"), (None, "float32")])
def test_auto_computes_in_bfloat16_where_the_checkpoint_is_bfloat16(key, stored, computed):
    assert config_from_hf(hf_dict("llama", **{key: stored})).dtype == computed
    assert config_from_hf(hf_dict("llama", **{key: stored}), dtype="float32").compute_dtype == jnp.float32


def test_an_unknown_dtype_lists_those_known():
    with pytest.raises(ArchitectureError, match="'float64' is not known; known are auto, float32, bfloat16"):
        config_from_hf(hf_dict("llama"), dtype="float64")


@st.composite
def ropes(draw, head_dim: int) -> RopeConfig:
    """Any rotary settings, each read by its own scaling."""
    number, ratio, length = st.floats(1.0, 16.0), st.none() | st.floats(0.5, 2.0), st.sampled_from([8, 32, 512])
    original = {"original_max_position_embeddings": length}
    factors = {key: st.tuples(*[number] * (head_dim // 2)) for key in ("short_factor", "long_factor")}
    yarn = {"mscale": ratio, "mscale_all_dim": ratio, "beta_fast": st.none() | st.floats(4.0, 64.0), "beta_slow": ratio}
    fields = {
        "default": {},
        "linear": {"factor": number},
        "dynamic": {"factor": number},
        "yarn": {"factor": number, "attention_factor": ratio, "truncate": st.booleans(), **yarn, **original},
        "longrope": {"factor": st.none() | number, "attention_factor": ratio, **factors, **original},
        "llama3": {"factor": number, "low_freq_factor": st.floats(0.5, 1.5), "high_freq_factor": st.floats(2.0, 8.0), **original},
    }
    rope_type = draw(st.sampled_from(ROPE_TYPES))
    limits = {"rope_theta": st.floats(100.0, 1e6), "max_position_embeddings": length}
    return RopeConfig(rope_type=rope_type, **draw(st.fixed_dictionaries({**limits, **fields[rope_type]})))


@st.composite
def configs(draw) -> ModelConfig:
    """Any config that one of the families can have."""
    family, window, head_dim = draw(st.sampled_from(list(FAMILIES))), st.sampled_from([None, 7]), draw(st.sampled_from([8, 32]))
    heads, kv, blocks = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2])), draw(st.integers(1, 4))
    windows = {"llama": st.just([None] * blocks), "mistral": window.map(lambda w: [w] * blocks)}
    windows = windows.get(family, st.lists(window, min_size=blocks, max_size=blocks))
    bias = family in ("llama", "qwen3") and draw(st.booleans())
    sizes = SIZES | {"hidden_size": 16 * heads * kv, "num_hidden_layers": blocks, "num_attention_heads": heads * kv}
    return ModelConfig(
        **{"model_type": family, **sizes, "num_key_value_heads": kv, "head_dim": head_dim, "qk_norm": family == "qwen3"},
        **{"qkv_bias": bias or family == "qwen2", "o_bias": bias, "mlp_bias": family == "llama" and draw(st.booleans())},
        **{"tie_word_embeddings": draw(st.booleans()), "hidden_act": draw(st.sampled_from(["silu", "gelu"]))},
        **{"rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])), "dtype": draw(st.sampled_from(["float32", "bfloat16"]))},
        **{"rope": draw(ropes(head_dim)), "layer_windows": tuple(draw(windows))},
    )


@settings(max_examples=60, deadline=None)
@given(configs(), st.sampled_from([6, 40]))
def test_what_config_to_hf_writes_we_and_transformers_read_back(config, length):
    file = json.loads(json.dumps(config_to_hf(config, dtype=config.dtype)))
    assert config_from_hf(file) == config
    theirs = torch_config(file)
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
            assert [id(linear) for linear in linears] == [id(linear) for linear in stage.linears]
            carry = stage.combine(carry, [linear(h) for linear in linears])
            names += stage.names
        every = [".".join(path) for path, module in nnx.iter_modules(block) if isinstance(module, Linear)]
        assert sorted(names) == sorted(every)
        residual = block(residual)
        np.testing.assert_array_equal(carry.residual, residual)
    np.testing.assert_array_equal(decoder.logits(residual), decoder(jnp.asarray(TOKENS)))


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
