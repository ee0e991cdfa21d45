"""Values of a config.json against the table of what they may be."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rows.common import hf_dict
from rows.dense import GPTJ
from twins import ROWS, opt_dict

from jgptq.errors import ArchitectureError, CheckpointError, JgptqError
from jgptq.models import FAMILIES, ModelConfig, config_from_hf
from jgptq.models.architecture.typed import KEYS, read_keys


def test_every_key_of_every_row_is_in_the_table():
    assert not set().union(*map(read_keys, FAMILIES.values())) - KEYS.keys()


def test_the_table_is_in_alphabetical_order():
    assert list(KEYS) == sorted(KEYS)


@pytest.mark.parametrize("name", ROWS)
def test_the_table_accepts_what_real_configs_say(name):
    assert isinstance(config_from_hf(json.loads(json.dumps(ROWS[name][0]))), ModelConfig)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_attention_heads": "4"}, "num_attention_heads: expected a whole number in [1, 65536], found '4'"),
        ({"num_attention_heads": 0}, "num_attention_heads: expected a whole number in [1, 65536], found 0"),
        ({"num_key_value_heads": -2}, "num_key_value_heads: expected a whole number in [1, 65536] or null, found -2"),
        ({"num_key_value_heads": True}, "num_key_value_heads: expected a whole number in [1, 65536] or null, found True"),
        ({"hidden_size": math.nan}, "hidden_size: expected a whole number in [1, 16777216], found nan"),
        ({"hidden_size": 1.5}, "hidden_size: expected a whole number in [1, 16777216], found 1.5"),
        ({"vocab_size": 64.0}, "vocab_size: expected a whole number in [1, 16777216], found 64.0"),
        ({"intermediate_size": 10**30}, "intermediate_size: expected a whole number in [1, 16777216], found 1000"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: expected a whole number in [1, 65536], found 1000000000"),
        ({"rms_norm_eps": None}, "rms_norm_eps: expected a number in [0, 1], found None"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps: expected a number in [0, 1], found inf"),
        ({"rope_parameters": 7}, "rope_parameters: expected an object or null, found 7"),
        ({"rope_scaling": []}, "rope_scaling: expected an object or null, found []"),
        ({"rope_theta": 0}, "rope_theta: expected a number in [1.001, 1e+18] or null, found 0"),
        ({"rope_scaling": {"rope_theta": "x"}}, "rope_scaling.rope_theta: expected a number in [1.001, 1e+18] or null"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor: expected a number in [1e-06, 1e+06] or null"),
        ({"rope_scaling": {"type": 3}}, "rope_scaling.type: expected a word or null, found 3"),
        ({"rope_scaling": {"short_factor": [1.0, "2"]}}, "rope_scaling.short_factor: expected a list, each a number in"),
        ({"max_position_embeddings": None}, "max_position_embeddings: expected a whole number in [1, 2147483647], found None"),
        ({"sliding_window": -1}, "sliding_window: expected a whole number in [0, 2147483647] or null, found -1"),
        (
            {"sliding_window": 0, "use_sliding_window": True},
            "sliding_window: expected a whole number above 0 or null, found 0",
        ),
        ({"sliding_window": "4096"}, "sliding_window: expected a whole number in [0, 2147483647] or null, found '4096'"),
        ({"use_sliding_window": 1}, "use_sliding_window: expected true or false, found 1"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings: expected true or false, found 'false'"),
        ({"attention_bias": 0}, "attention_bias: expected true or false, found 0"),
        ({"layer_types": "full_attention"}, "layer_types: expected a list, each a word or null, found 'full_attention'"),
        ({"layer_types": [["full_attention"]]}, "layer_types: expected a list, each a word or null"),
        ({"hidden_act": ["silu"]}, "hidden_act: expected a word, found ['silu']"),
        ({"torch_dtype": {}}, "torch_dtype: expected a word or null, found {}"),
        ({"quantization_config": []}, "quantization_config: expected an object or null, found []"),
        ({"quantization_config": {"bits": True}}, "quantization_config.bits: expected a whole number in [1, 32] or null"),
        ({"quantization_config": {"group_size": "128"}}, "quantization_config.group_size: expected a whole number in"),
        ({"quantization_config": {"meta": []}}, "quantization_config.meta: expected an object or null, found []"),
    ],
)
def test_a_value_of_a_wrong_type_or_out_of_range_names_key_expected_and_found(changes, sentence):
    with pytest.raises(CheckpointError) as caught:
        config_from_hf(hf_dict("qwen3") | changes)
    assert sentence in str(caught.value)


def test_a_value_that_the_family_does_not_read_is_not_checked():
    assert config_from_hf(hf_dict("llama", sliding_window=0, layer_types=3)) == config_from_hf(hf_dict("llama"))
    assert config_from_hf(opt_dict(rope_theta="x")) == config_from_hf(opt_dict())


def test_null_where_transformers_writes_it_is_silence():
    silent = hf_dict("stablelm", partial_rotary_factor=None, rope_theta=None, num_key_value_heads=None, dtype=None)
    assert config_from_hf(silent).positions.partial_rotary_factor == 0.25
    assert config_from_hf(silent).positions.rope_theta == 10000.0


def test_all_problems_of_a_config_come_in_one_error():
    wrong = hf_dict("qwen3", hidden_size=None, head_dim=0, rms_norm_eps="1e-6", rope_scaling={"factor": "8", "type": "linear"})
    with pytest.raises(CheckpointError) as caught:
        config_from_hf(wrong)
    assert all(
        f"{word}" in str(caught.value) for word in ("hidden_size missing", "head_dim:", "rms_norm_eps:", "rope_scaling.factor:")
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 128, "num_key_value_heads": 128}, "hidden_size 64 cannot be divided into 128 attention heads"),
        ({"head_dim": 15}, "an even number of features of a head, found 15"),
        ({"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "more than 2 rotated features"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
            "expected low_freq_factor below high_freq_factor, found 4.0 and 4.0",
        ),
        (
            {
                "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
                "max_position_embeddings": 1,
            },
            "original_max_position_embeddings above 1",
        ),
    ],
)
def test_values_that_are_allowed_alone_and_not_together_are_refused(changes, message):
    with pytest.raises(CheckpointError, match=message):
        config_from_hf(hf_dict("llama") | changes)


@pytest.mark.parametrize(
    ("model_type", "nearest"), [("lama", "the nearest is llama"), ("qwen4", "the nearest is qwen"), ("zzz", "known are")]
)
def test_an_unknown_architecture_names_the_nearest(model_type, nearest):
    with pytest.raises(ArchitectureError, match=nearest):
        config_from_hf(hf_dict(model_type))


def test_rotary_settings_of_each_kind_of_block_are_checked_and_refused_where_a_family_has_none():
    each = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    gemma3 = hf_dict("gemma3_text", rope_theta=None, sliding_window=5, layer_types=["sliding_attention", "full_attention"])
    layers = config_from_hf(gemma3 | {"rope_parameters": each}).layers
    assert [layer.rope.rope_theta for layer in layers] == [1e4, 1e6]
    with pytest.raises(CheckpointError, match=r"rope_parameters.sliding_attention.rope_theta: expected a number"):
        config_from_hf(gemma3 | {"rope_parameters": each | {"sliding_attention": {"rope_theta": "x"}}})
    with pytest.raises(ArchitectureError, match="of their own for full_attention, sliding_attention are not implemented"):
        config_from_hf(hf_dict("llama", rope_parameters=each))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotary_dim": 18}, "rotary_dim 18 is more than a head has, 16"),
        ({"rotary_dim": 5}, "even number of features of a head, found 5"),
        ({"n_positions": 0}, "n_positions: expected a whole number in"),
        ({"hidden_size": "64"}, "hidden_size: expected a whole number in"),  # another name of n_embd
    ],
)
def test_keys_that_only_a_gptj_has_are_checked(changes, message):
    with pytest.raises(CheckpointError, match=message):
        config_from_hf(GPTJ | changes)


def test_another_name_of_a_required_key_is_enough():
    renamed = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
    assert config_from_hf({renamed.get(key, key): value for key, value in GPTJ.items()}) == config_from_hf(GPTJ)


def test_code_that_a_config_names_is_never_run_and_the_error_says_so():
    code = {"auto_map": {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}}
    with pytest.raises(ArchitectureError, match=r"code of its own \(auto_map\), which is never run"):
        config_from_hf(hf_dict("x_model") | code)
    assert config_from_hf(hf_dict("llama") | code) == config_from_hf(hf_dict("llama"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "factor", "bits"]), inner, max_size=3),
    max_leaves=5,
)


@given(
    st.sampled_from([hf for hf, _ in ROWS.values()]),
    st.data(),
)
def test_no_value_of_any_key_raises_anything_but_our_errors(hf, data):
    keys = data.draw(st.lists(st.sampled_from([*KEYS, "model_type", "alibi", "num_experts"]), min_size=1, max_size=3))
    changed = hf | {key: data.draw(JSON) for key in keys}
    try:
        config = config_from_hf(changed)
    except JgptqError:
        return
    assert len(config.layer_windows) == config.num_hidden_layers
