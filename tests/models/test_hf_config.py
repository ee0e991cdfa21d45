"""The config.json of every family: what is read, what is written, what is refused."""

import dataclasses
import importlib
import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from rows.common import SIZES, SLIDING, hf_dict
from rows.dense import MULTIPLIERS
from rows.fused import BLOOM, GPT2
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from twins import LONG, ROPE_TYPES, ROWS, torch_config, twin

from jgptq.errors import ArchitectureError, CheckpointError
from jgptq.models import FAMILIES, AlibiPositions, LearnedPositions, ModelConfig, RopeConfig, config_from_hf, config_to_hf
from jgptq.models.architecture.config import Positions
from jgptq.models.architecture.row import REQUIRED, Family, Key
from jgptq.models.rotary import rotary_tables

MODEL_TYPES = {family.model_type or name for name, family in FAMILIES.items()}


def torch_windows(config: transformers.PretrainedConfig) -> tuple[int | None, ...]:
    """The window of each block, as transformers' models read their config."""
    window, blocks = getattr(config, "sliding_window", None), config.num_hidden_layers
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * blocks
    return tuple(window if kind == "sliding_attention" else None for kind in types)


@pytest.mark.parametrize("name", ROWS)
def test_the_forms_that_transformers_writes_read_like_the_old_one(name):
    config, old = twin(name).config, config_from_hf(ROWS[name][0])
    file = json.loads(config.to_json_string())  # what save_pretrained writes
    assert not {"rope_scaling", "rope_theta", "rotary_pct", "rotary_emb_base"} & file.keys()
    assert config_from_hf(file) == old
    assert config_from_hf(config.to_dict()) == old
    assert torch_windows(config) == old.layer_windows


@pytest.mark.parametrize("name", ROWS)
def test_what_config_to_hf_writes_of_a_row_is_read_back(name):
    config = config_from_hf(ROWS[name][0])
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config


@pytest.mark.parametrize("family", FAMILIES)
def test_a_silent_config_gets_the_defaults_of_transformers(family):
    row = FAMILIES[family]
    heads = 16 if row.rotary_dim is not None else 160  # a multiple of every default number of key-value heads
    asked = {**SIZES, "hidden_size": 1280, "num_attention_heads": heads, "num_key_value_heads": None}
    sizes = {row.keys[name].name: size for name, size in asked.items() if name in row.keys and row.keys[name].default is REQUIRED}
    form = {key: values[0] for key, values in row.where.items() if None not in values}
    chosen = {"num_experts_per_tok": 2} if family == "deepseek_v2" else {}
    silent = {"model_type": row.model_type or family, **sizes, **form, **chosen}
    yarn, windows = {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, {"use_sliding_window": True, "max_window_layers": 1}
    yarn = yarn if row.positions == "rotary" and row.rotary_dim is None and "yarn" not in row.rope_types else {}
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
        ({"model_type": "mamba"}, ArchitectureError, ["'mamba'", *MODEL_TYPES]),
        ({"model_type": None}, ArchitectureError, ["None", *MODEL_TYPES]),
        ({"model_type": "falcon_grouped"}, ArchitectureError, ["'falcon_grouped' is not known", *MODEL_TYPES]),
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
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, ArchitectureError, ["attn_logit_softcapping null"]),
        ({"model_type": "gemma3_text", "sliding_window": None}, ArchitectureError, ["expected a number as sliding_window"]),
        ({"model_type": "cohere2", "use_qk_norm": True}, ArchitectureError, ["use_qk_norm False, found True", "'cohere2'"]),
        ({"model_type": "phi", "tie_word_embeddings": True}, ArchitectureError, ["tie_word_embeddings False, found True"]),
        ({"model_type": "exaone4", "sliding_window_pattern": "LLLG"}, ArchitectureError, ["layer_types", "'LLLG'"]),
        ({"no_rope_layers": [1, 0]}, ArchitectureError, ["no_rope_layers null", "'llama'"]),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, CheckpointError, ["no_rope_layers", "2 blocks, found 1"]),
        ({"model_type": "opt"}, CheckpointError, ["ffn_dim missing"]),
        ({"model_type": "gpt2", "hidden_size": None}, CheckpointError, ["n_embd missing; is this the config of a gpt2 model"]),
        (
            {"model_type": "gpt2", **GPT2, "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
            ArchitectureError,
            ["scale_attn_by_inverse_layer_idx False, found True", "reorder_and_upcast_attn False, found True"],
        ),
        (
            {"model_type": "gpt2", **GPT2, "scale_attn_weights": False},
            ArchitectureError,
            ["scale_attn_weights True, found False"],
        ),
        ({"model_type": "gpt2", **GPT2, "add_cross_attention": True}, ArchitectureError, ["add_cross_attention False"]),
        (
            {**BLOOM, "apply_residual_connection_post_layernorm": True},
            ArchitectureError,
            ["apply_residual_connection_post_layernorm False, found True", "'bloom'"],
        ),
        (
            {"model_type": "falcon", "new_decoder_architecture": True, "parallel_attn": False},
            ArchitectureError,
            ["'falcon'", "new_decoder_architecture True", "parallel_attn False", "num_ln_in_parallel_attn None"],
        ),
        ({"model_type": "falcon", "num_ln_in_parallel_attn": 2}, ArchitectureError, ["num_ln_in_parallel_attn 2"]),
        ({"model_type": "opt", "ffn_dim": 96, "activation_function": "mish"}, ArchitectureError, ["activation_function 'mish'"]),
        ({"model_type": "qwen2", **SLIDING, "layer_types": ["full_attention"]}, ArchitectureError, ["layer_types", "2"]),
        ({"model_type": "qwen3", **SLIDING, "layer_types": ["linear_attention"] * 2}, ArchitectureError, ["linear_attention"]),
    ],
)
def test_a_config_that_cannot_be_read_says_why(changes, error, words):
    with pytest.raises(error) as caught:
        config_from_hf(hf_dict("llama") | changes)
    assert all(word in str(caught.value) for word in words)


def test_a_number_of_rotated_features_survives_as_a_part_of_the_head():
    sizes = [(features, head_dim) for head_dim in range(8, 130, 2) for features in range(2, head_dim + 1, 2)]
    assert all(RopeConfig(partial_rotary_factor=few / many).rotated(many) == few for few, many in sizes)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(("stored", "computed"), [("bfloat16", "bfloat16"), ("float16", "float32"), (None, "float32")])
def test_auto_computes_in_bfloat16_where_the_checkpoint_is_bfloat16(key, stored, computed):
    assert config_from_hf(hf_dict("llama", **{key: stored})).dtype == computed
    assert config_from_hf(hf_dict("llama", **{key: stored}), dtype="float32").compute_dtype == jnp.float32


def test_an_unknown_dtype_lists_those_known():
    with pytest.raises(ArchitectureError, match="'float64' is not known; known are auto, float32, bfloat16"):
        config_from_hf(hf_dict("llama"), dtype="float64")


@st.composite
def ropes(draw, rotated: int) -> RopeConfig:
    """Any rotary settings, each read by its own scaling."""
    number, ratio, length = st.floats(1.0, 16.0), st.none() | st.floats(0.5, 2.0), st.sampled_from([8, 32, 512])
    original = {"original_max_position_embeddings": length}
    factors = {key: st.tuples(*[number] * (rotated // 2)) for key in ("short_factor", "long_factor")}
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
    "embedding_width": st.sampled_from([None, 40]),
    "clip_qkv": st.sampled_from([None, 8.0]),
    "logit_scale": st.just(0.3),
    **dict.fromkeys(MULTIPLIERS, st.just(0.3)),
}


@st.composite
def configs(draw) -> ModelConfig:
    """Any config that one of the dense families can have; for the others see `tests/converters/test_expert_files.py`."""
    name = draw(st.sampled_from([name for name, family in FAMILIES.items() if family.experts is None]))
    family = FAMILIES[name]
    heads, kv, blocks = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2])), draw(st.integers(1, 4))
    sizes = SIZES | {"hidden_size": 16 * heads * kv, "num_hidden_layers": blocks, "num_attention_heads": heads * kv}
    if "intermediate_size" not in family.keys:
        sizes["intermediate_size"] = 4 * sizes["hidden_size"]
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
    for switch in {"block_form", "qk_norm"} & family.keys.keys():
        switches[switch] = draw(st.sampled_from(list(family.keys[switch].values.values())))
    switches |= {
        "head_dim": head_dim,
        "num_key_value_heads": kv if "num_key_value_heads" in family.keys else heads * kv,
        "hidden_act": draw(st.sampled_from(["relu", "gelu_pytorch_tanh"])),
    }
    positions, layer_windows = draw(positions_of(family, head_dim)), tuple(draw(windows))
    return ModelConfig(
        **{"model_type": name, **sizes, **switches, **family.fixed},
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        positions=positions,
        layer_windows=layer_windows,
        layer_ropes=draw(layer_ropes(family, positions, layer_windows, head_dim)),
    )


@st.composite
def positions_of(draw, family: Family, head_dim: int) -> Positions:
    """Any positions that models of a family can have."""
    kind = (
        draw(st.sampled_from(list(family.positions.values.values()))) if isinstance(family.positions, Key) else family.positions
    )
    most = draw(st.sampled_from([8, 512]))
    if kind == "learned":
        return LearnedPositions(max_position_embeddings=most, offset=family.position_offset)
    if kind == "alibi":
        return AlibiPositions(max_position_embeddings=most, **family.alibi)
    if family.rotary_dim is not None:
        return RopeConfig(partial_rotary_factor=draw(st.sampled_from([4, 10, 16])) / head_dim, max_position_embeddings=most)
    part = 1.0 if family.partial_rotary is None else draw(st.sampled_from([0.5, 1.0]))
    rope = dataclasses.replace(draw(ropes(int(head_dim * part))), partial_rotary_factor=part)
    if family.rope_types:  # transformers refuses most scalings of such a family
        rope = RopeConfig(rope_theta=rope.rope_theta, partial_rotary_factor=part, max_position_embeddings=most)
    # Where there are settings of kinds of blocks, transformers reads `truncate` and does not write it.
    return rope if family.local_theta is None else dataclasses.replace(rope, truncate=True)


@st.composite
def layer_ropes(draw, family, positions, windows, head_dim: int) -> tuple | None:
    """The rotary settings of blocks, where a family lets them differ and they do."""
    if family.rotated == "all" or (family.rotated == "sliding_or_all" and set(windows) == {None} and draw(st.booleans())):
        return None
    if family.rotated == "listed":
        each = [positions if draw(st.booleans()) else None for _ in windows]
    elif family.local_theta is None:
        each = [None if window is None else positions for window in windows]
    else:
        most = positions.max_position_embeddings
        local = dataclasses.replace(draw(ropes(head_dim)), max_position_embeddings=most, truncate=True)
        each = [positions if window is None else local for window in windows]
    return None if each == [positions] * len(windows) else tuple(each)


@settings(max_examples=100, deadline=None)
@given(configs(), st.sampled_from([6, 40]))
def test_what_config_to_hf_writes_we_and_transformers_read_back(config, length):
    file = json.loads(json.dumps(config_to_hf(config, dtype=config.dtype)))
    assert config_from_hf(file) == config
    theirs = torch_config(file)
    assert torch_windows(theirs) == config.layer_windows
    assert theirs.architectures == [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[theirs.model_type]]
    if not isinstance(config.positions, RopeConfig) or FAMILIES[config.model_type].rotary_dim is not None:
        return
    for window, rope in {(layer.window is not None, layer.rope) for layer in config.layers if layer.rope is not None}:
        kind = ("sliding_attention" if window else "full_attention",)
        kind = () if FAMILIES[config.model_type].local_theta is None else kind
        expected = rotary_of(theirs)(torch.zeros(1), torch.arange(length)[None], *kind)
        for ours, reference in zip(rotary_tables(rope, config.head_dim, length), expected, strict=True):
            half = ours.shape[-1] // 2
            angles = reference[0, :, ::2] if config.model_type.startswith("cohere") else reference[0, :, :half]
            np.testing.assert_array_equal(ours[:, half:], ours[:, :half])
            np.testing.assert_allclose(ours[:, :half], angles, rtol=0, atol=5e-5)


def rotary_of(config: transformers.PretrainedConfig) -> torch.nn.Module:
    """transformers' rotary embedding of a config's own architecture."""
    modeling = importlib.import_module(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__module__)
    name = next(name for name in vars(modeling) if name.endswith("RotaryEmbedding"))
    return getattr(modeling, name)(config)
