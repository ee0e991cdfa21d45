"""Rules: the settings they give to a name, errors and warnings."""

import json
import re
from typing import Any

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

import jgptq
from jgptq.errors import ConfigError, RuleWarning
from jgptq.settings.rule import Rule
from jgptq.settings.rules import nearest_names, resolve, rules_from_dynamic, rules_to_dynamic, without_effect
from jgptq.settings.run import QuantizeConfig

pytestmark = pytest.mark.filterwarnings("ignore:vLLM refuses", "ignore:transformers reads no rules")

DOWN = "model.layers.0.mlp.down_proj"

overrides = st.fixed_dictionaries(
    {},
    optional={
        "bits": st.sampled_from([2, 3, 4, 8]),
        "group_size": st.sampled_from([-1, 32, 64, 128]),
        "sym": st.booleans(),
        "order": st.sampled_from(["none", "group"]),
        "method": st.sampled_from(["gptq", "rtn"]),
    },
)
patterns = st.text(min_size=1, max_size=12).map(re.escape).filter(lambda text: not text.startswith(("+:", "-:")))
dynamics = st.dictionaries(patterns, st.one_of(st.none(), overrides), max_size=5).map(
    lambda rules: {f"{'-' if value is None else '+'}:{key}": value or {} for key, value in rules.items()}
)


@given(dynamics)
def test_rules_and_dynamic_are_two_forms_of_one_thing(dynamic: dict):
    rules = rules_from_dynamic(dynamic)
    assert list(rules_to_dynamic(rules).items()) == list(dynamic.items())  # the order counts
    assert rules_from_dynamic(json.loads(json.dumps(dynamic))) == rules
    assert QuantizeConfig(rules=rules).rules == rules


def test_a_key_without_prefix_overrides():
    assert rules_from_dynamic({".*down": {"bits": 8}}) == rules_from_dynamic({"+:.*down": {"bits": 8}})


def test_the_first_match_wins_and_changes_only_what_it_names():
    config = QuantizeConfig(
        group_size=64,
        rules=(Rule(pattern=r".*0\.mlp", bits=8), Rule(pattern=".*mlp", bits=2, sym=False), Rule(pattern=".*", skip=True)),
    )
    assert resolve(config, DOWN) == QuantizeConfig(group_size=64, bits=8).solver
    assert resolve(config, DOWN.replace("0", "1")) == QuantizeConfig(group_size=64, bits=2, sym=False).solver
    assert resolve(config, "model.layers.0.self_attn.o_proj") is None
    assert resolve(QuantizeConfig(lm_head=True), "lm_head") == QuantizeConfig().solver


def test_an_empty_rule_shields_from_those_after_it():
    config = QuantizeConfig(rules=rules_from_dynamic({f"+:{re.escape(DOWN)}": {}, "-:.*down_proj": {}}))
    assert resolve(config, DOWN) == QuantizeConfig().solver
    assert resolve(config, DOWN.replace("0", "1")) is None


def test_patterns_are_anchored_at_the_start_only():
    config = QuantizeConfig(rules=(Rule(pattern="layers", bits=8), Rule(pattern="model.layers.0.mlp", bits=3)))
    assert resolve(config, DOWN).bits == 3


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        ({"+:(": {}}, r"must be a regex, found '\(': missing \)"),
        ({"a": {"bit": 8, "mse": 1}}, "unknown keys bit, mse; known are bits, group_size, sym, method, order"),
        ({"-:a": {"bits": 8}}, "rule 'a': it skips, so it cannot set bits"),
        ({"a": {"bits": "8"}}, "bits must be int, found '8'"),
        ({"a": {"bits": True}}, "bits must be int, found True"),
        ({"a": {"sym": 1}}, "sym must be bool, found 1"),
        ({"a": {"bits": None}}, "sets bits to nothing"),
        ({"a": 8}, "rule 'a' must be a dict"),
        ({"+:-:a": {}}, "belong to the dynamic form"),
        ({"a": {"bits": 5}, "b": {"group_size": 33}}, r"rule 'a': bits must be one of .*rule 'b': group_size must be"),
        ({"a": {"method": "awq"}}, "rule 'a': method must be one of"),
        ({"a": {}, "-:a": {}}, "the first match wins, so only one can have the pattern 'a'"),
        (5, "rules must be a tuple of Rule, found 5"),
        ("a", "rules must be a tuple of Rule"),
    ],
)
def test_rules_that_cannot_be_used_are_refused(dynamic: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        jgptq.quantize(tiny.decoder(), method="rtn", group_size=32, rules=dynamic)


@pytest.mark.parametrize(
    ("dynamic", "names", "sources"),
    [
        (
            {".*q_proj": {"bits": 8}},
            "q_proj, self_attn.k_proj",
            r"q_proj: bits=8 by rule '.\*q_proj'.*k_proj: the run's settings",
        ),
        ({"-:.*up_proj": {}}, "gate_proj, mlp.up_proj", r"up_proj: skipped by rule '.\*up_proj'"),
        (
            {".*gate": {"method": "rtn"}, ".*up": {}},
            "gate_proj, mlp.up_proj",
            r"method=rtn by rule '.\*gate'.*the run's settings by",
        ),
    ],
)
def test_linears_that_are_fused_must_agree(dynamic: dict, names: str, sources: str):
    with pytest.raises(ConfigError, match=rf"(?s){names}.*different settings.*readers fuse them.*{sources}"):
        jgptq.quantize(tiny.decoder(), tiny.tokens(), group_size=32, rules=dynamic)


def test_rules_that_differ_in_form_but_not_in_settings_agree():
    rules = {".*q_proj": {"bits": 8}, ".*[kv]_proj": {"bits": 8, "group_size": 32}}
    quantized, _ = jgptq.quantize(tiny.decoder(), method="rtn", group_size=32, rules=rules)
    assert [getattr(quantized.layers[1].self_attn, f"{name}_proj").kernel.get_value().bits for name in "qkvo"] == [8, 8, 8, 4]


def test_a_group_size_of_a_rule_must_divide_k():
    with pytest.raises(
        ConfigError, match=r"^group_size 64 does not divide K: layers\.0\.mlp\.down_proj has K=96\. .*: -1, 32, 96$"
    ):
        jgptq.quantize(tiny.decoder(), method="rtn", group_size=32, rules={".*down": {"group_size": 64}})


def test_skipping_everything_is_refused():
    with pytest.raises(ConfigError, match=r"no linear can be packed: skipped by rule '\.\*'"):
        jgptq.quantize(tiny.decoder(), method="rtn", group_size=32, rules={"-:.*": {}})


def test_a_rule_that_matches_nothing_is_warned_of_with_the_nearest_names():
    for pattern, nearest in (
        ("model.layers.0.mlp.downproj", "model.layers.0.mlp.down_proj"),
        (r"^model\.layers\.1\.attn\.o_proj$", r"model.layers.1.self_attn.o_proj"),
        (".*gate_projection", "model.layers.0.mlp.gate_proj"),
    ):
        with pytest.warns(RuleWarning, match=rf"^rule {re.escape(repr(pattern))} matches no linear.*names are {nearest},"):
            jgptq.quantize(tiny.decoder(), method="rtn", group_size=32, rules={pattern: {"bits": 8}})


def test_warnings_of_a_rule_that_is_never_reached_and_of_one_on_the_head_give_the_reason():
    names = [DOWN, "model.layers.0.mlp.up_proj"]
    config = QuantizeConfig(rules=rules_from_dynamic({".*proj": {}, ".*down": {"bits": 8}, "lm_head": {"bits": 8}}))
    shadowed, head = without_effect(config, names)
    assert shadowed.startswith("rule '.*down' has no effect: rules before it")
    assert head.startswith("rule 'lm_head' matches no linear")
    assert head.endswith("pass lm_head=True (--lm-head).")
    assert without_effect(config, [*names, "lm_head"]) == [shadowed]


def test_nearest_names_are_of_different_kinds():
    names = [f"model.layers.{index}.mlp.{kind}_proj" for index in range(40) for kind in ("gate", "up", "down")]
    assert nearest_names(r".*\.17\.mlp\.donw_proj", names)[0] == "model.layers.17.mlp.down_proj"
    assert len({name.rpartition(".")[2] for name in nearest_names(".*donw_proj", names)}) == 3
