"""The config.json of every family: what is read, what is written, what is refused."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.stablelm.modeling_stablelm import StableLmRotaryEmbedding
from twins import LONG, ROPE_TYPES, ROWS, SIZES, SLIDING, hf_dict, torch_config, twin

from jgptq.errors import ArchitectureError, CheckpointError
from jgptq.models import FAMILIES, LearnedPositions, ModelConfig, RopeConfig, config_from_hf, config_to_hf
from jgptq.models.rotary import rotary_tables


def torch_windows(config: transformers.PretrainedConfig) -> tuple[int | None, ...]:
    """The window of each block, as transformers' models read their config."""
    window, blocks = getattr(config, "sliding_window", None), config.num_hidden_layers
    by_block = config.model_type.startswith(("qwen", "gemma2")) and config.model_type != "qwen3_moe"
    types = config.layer_types if by_block else ["sliding_attention"] * blocks
    return tuple(window if kind == "sliding_attention" else None for kind in types)


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
    sizes = {FAMILIES[family].keys[name].name: size for name, size in {**SIZES, "num_attention_heads": 32}.items()}
    silent = {"model_type": family, **sizes} | ({"num_experts_per_tok": 2} if family == "deepseek_v2" else {})
    yarn, windows = {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, {"use_sliding_window": True, "max_window_layers": 1}
    yarn = yarn if FAMILIES[family].positions == "rotary" else {}
    for hf in (silent, silent | yarn, silent | windows):
        config, ours = torch_config(hf), config_from_hf(hf)
        assert ours == config_from_hf(config.to_dict())
        assert ours.layer_windows == torch_windows(config)


def test_rope_scaling_wins_over_rope_parameters_as_in_transformers():
    both = hf_dict("llama", rope_parameters={"rope_theta": 7.0}, rope_scaling={"type": "linear", "factor": 2.0})
    theirs = torch_config(both).rope_parameters
    assert config_from_hf(both).positions.rope_type == theirs["rope_type"] == "linear"
    assert config_from_hf(both).positions.rope_theta == theirs["rope_theta"]


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
        (
            {"alibi": True, "num_local_experts": 8},
            ArchitectureError,
            ["alibi False, found True", "num_local_experts 0 or 1, found 8"],
        ),
        ({"attn_logit_softcapping": 50.0}, ArchitectureError, ["attn_logit_softcapping null, found 50.0", "'llama'"]),
        ({"model_type": "stablelm", "qk_layernorm": True}, ArchitectureError, ["qk_layernorm", "'stablelm'"]),
        ({"model_type": "gemma", "use_bidirectional_attention": True}, ArchitectureError, ["use_bidirectional_attention"]),
        ({"model_type": "opt"}, CheckpointError, ["ffn_dim missing"]),
        ({"model_type": "opt", "ffn_dim": 96, "activation_function": "mish"}, ArchitectureError, ["activation_function 'mish'"]),
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


SWITCHES = {
    "tie_word_embeddings": st.booleans(),
    "norm_eps": st.sampled_from([1e-6, 1e-5]),
    "norm_affine": st.booleans(),
    "final_norm": st.booleans(),
    "query_pre_attn_scalar": st.sampled_from([16, 144]),
    "attn_logit_softcapping": st.sampled_from([None, 50.0]),
    "final_logit_softcapping": st.sampled_from([None, 30.0]),
    "embedding_width": st.sampled_from([None, 48]),
}


@st.composite
def configs(draw) -> ModelConfig:
    """Any config that one of the dense families can have; for the others see `tests/converters/test_expert_files.py`."""
    name = draw(st.sampled_from([name for name, family in FAMILIES.items() if family.experts is None]))
    family = FAMILIES[name]
    heads, kv, blocks = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2])), draw(st.integers(1, 4))
    sizes = SIZES | {"hidden_size": 16 * heads * kv, "num_hidden_layers": blocks, "num_attention_heads": heads * kv}
    head_dim = draw(st.sampled_from([8, 32])) if "head_dim" in family.keys else 16
    window = st.sampled_from([None, 7])
    windows = st.just([None] * blocks)
    if family.window is not None:
        same = family.window.blocks == "all"
        windows = window.map(lambda w: [w] * blocks) if same else st.lists(window, min_size=blocks, max_size=blocks)
    switches = {switch: draw(values) for switch, values in SWITCHES.items() if switch in family.keys}
    biases = [switch for switch in ("qkv_bias", "o_bias", "mlp_bias") if switch in family.keys]
    by_key = {family.keys[switch].name: draw(st.booleans()) for switch in biases}
    switches |= {switch: by_key[family.keys[switch].name] for switch in biases}
    if "block_form" in family.keys:
        switches["block_form"] = draw(st.sampled_from(list(family.keys["block_form"].values.values())))
    positions = ropes(head_dim) if family.partial_rotary is None else partial_ropes()
    if family.positions == "learned":
        positions = st.builds(LearnedPositions, max_position_embeddings=st.sampled_from([8, 512]), offset=st.just(2))
    return ModelConfig(
        **{"model_type": name, **sizes, **family.fixed, **switches, "head_dim": head_dim},
        num_key_value_heads=kv if "num_key_value_heads" in family.keys else heads * kv,
        hidden_act=draw(st.sampled_from(["relu", "gelu_pytorch_tanh"])),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        positions=draw(positions),
        layer_windows=tuple(draw(windows)),
    )


def partial_ropes() -> st.SearchStrategy[RopeConfig]:
    """Rotary settings of heads that are rotated in part."""
    return st.builds(
        RopeConfig,
        rope_theta=st.floats(100.0, 1e6),
        max_position_embeddings=st.sampled_from([8, 512]),
        partial_rotary_factor=st.sampled_from([0.25, 0.5, 1.0]),
    )


@settings(max_examples=100, deadline=None)
@given(configs(), st.sampled_from([6, 40]))
def test_what_config_to_hf_writes_we_and_transformers_read_back(config, length):
    file = json.loads(json.dumps(config_to_hf(config, dtype=config.dtype)))
    assert config_from_hf(file) == config
    theirs = torch_config(file)
    assert torch_windows(theirs) == config.layer_windows
    assert theirs.architectures == [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    if not isinstance(config.positions, RopeConfig):
        return
    rotary = StableLmRotaryEmbedding if config.model_type == "stablelm" else LlamaRotaryEmbedding
    expected = rotary(theirs)(torch.zeros(1), torch.arange(length)[None])
    for ours, reference in zip(rotary_tables(config.positions, config.head_dim, length), expected, strict=True):
        np.testing.assert_allclose(ours, reference[0], rtol=0, atol=5e-5)
