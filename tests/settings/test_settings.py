"""The settings of a run, as a folder records them."""

import json

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from converters.formats import Written, writer_of
from converters.formats.gptq import read_settings
from jgptq.errors import CheckpointError
from jgptq.settings.run import QuantizeConfig

configs = st.builds(
    QuantizeConfig,
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([-1, 32, 96, 128]),
    sym=st.booleans(),
    method=st.sampled_from(["gptq", "rtn", "gptaq", "qronos"]),
    order=st.sampled_from(["none", "group", "static", "desc_act"]),
    scale=st.sampled_from([None, "minmax", "mse", "hessian"]),
    target_shift=st.floats(0, 1),
    residual_shift=st.floats(0, 1),
    refine=st.integers(0, 9),
    refit=st.booleans(),
    tune=st.floats(0, 99, allow_subnormal=False),
    starved_experts=st.sampled_from(["shrink", "all_tokens", "rtn"]),
    min_tokens_per_feature=st.floats(0, 99, allow_subnormal=False),
    damping=st.floats(1e-6, 1),
    float64=st.booleans(),
)


@given(configs)
def test_the_settings_of_a_run_come_back_from_its_files(config: QuantizeConfig):
    stored = json.loads(
        json.dumps(writer_of("gptq_v2").quantization_config(Written(run=config, linears={}, model=tiny.config())))
    )
    assert read_settings(stored) == config


def test_a_folder_of_another_writer_claims_nothing_that_only_this_one_does():
    settings = read_settings({"bits": 4, "group_size": 64, "meta": {"quantizer": ["gptqmodel:7.6.0"], "damp_percent": 0.05}})
    assert settings == QuantizeConfig(
        group_size=64,
        damping=0.05,
        order="none",
        target_shift=0.0,
        residual_shift=0.0,
        starved_experts="rtn",
        min_tokens_per_feature=0.0,
    )


def test_settings_that_cannot_be_are_refused_by_name():
    with pytest.raises(CheckpointError, match=r"quantization_config cannot be read: order must be one of .* found 'sideways'"):
        read_settings({"bits": 4, "group_size": 64, "meta": {"order": "sideways"}})
