"""Models of mixed settings: what a run makes of rules, and how they reach files and come back."""

import json
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from stopping import Stopped, StoppingSink
from tiny import assert_same

import jgptq
from converters import FolderSink, load_hf, save_hf
from converters.formats import Written, check_format, writer_of
from jgptq.errors import CalibrationError, CheckpointError, ConfigError, OutputError
from jgptq.models import RESIDUAL
from jgptq.models.packed import PackedTensor
from jgptq.settings.rule import Rule
from jgptq.settings.rules import rules_from_dynamic, stored_rules
from jgptq.settings.run import QuantizeConfig
from jgptq.solver import solve
from jgptq.solver.statistics.hessian import accumulate, empty, hessian

pytestmark = pytest.mark.filterwarnings("ignore:vLLM refuses", "ignore:transformers reads no rules")

KINDS = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
DOWN = "model.layers.0.mlp.down_proj"


MIXED = {
    r"-:.*\.1\.self_attn\.[qkv]_proj": {},
    "+:.*down_proj": {"bits": 8},
    ".*(gate|up)_proj": {"group_size": -1, "sym": False},
    ".*o_proj": {"method": "rtn"},
    "lm_head": {"bits": 3, "order": "none"},
}
BASE = QuantizeConfig(group_size=32)
EXPECTED = {
    "self_attn.q_proj": BASE,
    "self_attn.k_proj": BASE,
    "self_attn.v_proj": BASE,
    "self_attn.o_proj": QuantizeConfig(group_size=32, method="rtn"),
    "mlp.gate_proj": QuantizeConfig(group_size=-1, sym=False),
    "mlp.up_proj": QuantizeConfig(group_size=-1, sym=False),
    "mlp.down_proj": QuantizeConfig(group_size=32, bits=8),
    "lm_head": QuantizeConfig(group_size=32, bits=3, order="none"),
}


@pytest.fixture(scope="module")
def mixed():
    """A run with all kinds of rules, on GPTQ."""
    return jgptq.quantize(tiny.decoder(), tiny.tokens(), preset="fast", group_size=32, rules=MIXED, lm_head=True)


def test_every_linear_is_solved_with_its_own_settings_on_what_it_really_reads(mixed):
    """A forward pass by hand over all samples at once gives the driver's weights, those of the head included."""
    params, (quantized, report) = tiny.decoder(), mixed
    rows = {row.name: row for row in report.rows}
    carry = {RESIDUAL: params.embed(jnp.asarray(tiny.tokens()))}
    units, packed = [*params.layers, params.head()], [*quantized.layers, quantized.head()]
    for index, (unit, done) in enumerate(zip(units, packed, strict=True)):
        assert unit.stages() == done.stages()
        for stage in unit.stages():
            h = unit.inputs(stage, carry)
            h_kk = hessian(accumulate(empty(h.shape[-1]), h))
            for name in stage.linears:
                linear, other = unit.linears()[name], done.linears()[name]
                row = rows[name if name == "lm_head" else f"layers.{index}.{name}"]
                kernel, packed_kernel = linear.kernel.get_value(), other.kernel.get_value()
                if index == 1 and name in KINDS[0]:
                    assert row.note == rf"Stays float: skipped by rule '{next(iter(MIXED))[2:]}'.".replace("\\", "\\\\")
                    np.testing.assert_array_equal(packed_kernel, kernel)
                    continue
                config = EXPECTED[name]
                grid = (packed_kernel.bits, packed_kernel.group_size, packed_kernel.zeros is None)
                assert grid == (config.bits, config.group_size, config.sym)
                assert (row.outcome, row.bits) == ("ROUNDED" if config.method == "rtn" else "SOLVED", config.bits)
                assert row.tokens == 24 * 16
                expected = solve(kernel.astype(jnp.float32), h_kk, config).dequantize()
                assert np.mean(np.abs(np.asarray(packed_kernel.dequantize() - expected)) > 1e-5) < 0.02
            carry = done.combine(stage, carry, {name: done.linears()[name](h) for name in stage.linears})
    assert len(report.rows) == 15


def test_the_quantized_head_serves_the_logits(mixed):
    quantized, tokens = mixed[0], jnp.asarray(tiny.tokens(2))
    residual = quantized.embed(tokens)
    for block in quantized.layers:
        residual = block(residual)
    by_hand = np.asarray(quantized.norm(residual)) @ np.asarray(quantized.lm_head.kernel.get_value().dequantize())
    np.testing.assert_allclose(quantized(tokens), by_hand, atol=1e-4)


def static_parts(decoder) -> list[tuple[int, int] | None]:
    """Bits and group size of every linear, in order; None for float."""
    linears = [linear for block in decoder.layers for linear in block.linears().values()]
    kernels = [linear.kernel.get_value() for linear in (*linears, decoder.lm_head)]
    return [(kernel.bits, kernel.group_size) if isinstance(kernel, PackedTensor) else None for kernel in kernels]


def test_a_mixed_model_reads_back_as_it_was_written_and_is_written_as_it_was_read(tmp_path: Path, mixed):
    quantized, _ = mixed
    first = save_hf(quantized, tmp_path / "first", format="gptq_v2")
    loaded = load_hf(first)
    assert_same(quantized, loaded)
    assert loaded.quantization == quantized.quantization
    assert static_parts(loaded) == static_parts(quantized)
    tokens = jnp.asarray(tiny.tokens(2))
    np.testing.assert_array_equal(quantized(tokens), loaded(tokens))
    second = save_hf(loaded, tmp_path / "second", format="gptq_v2")
    for name in sorted(path.name for path in first.iterdir() if path.name != "README.md"):  # which names where it came from
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_a_mixed_model_expands_to_a_float_folder(tmp_path: Path, mixed):
    loaded = load_hf(save_hf(mixed[0], tmp_path / "out", format="float"))
    assert set(static_parts(loaded)) == {None}
    np.testing.assert_array_equal(
        loaded.lm_head.kernel.get_value(), np.asarray(mixed[0].lm_head.kernel.get_value().dequantize(), np.float16)
    )


def test_a_head_that_is_tied_is_refused():
    with pytest.raises(ConfigError, match=r"tie_word_embeddings.*untie them"):
        jgptq.quantize(tiny.decoder(tie_word_embeddings=True), method="rtn", group_size=32, lm_head=True)


def test_a_head_of_an_odd_width_stays_float_and_is_reported(tmp_path: Path):
    params = tiny.decoder(vocab_size=100)
    sink = FolderSink(tmp_path / "out", params, QuantizeConfig(group_size=32, method="rtn", lm_head=True), None)
    quantized, report = jgptq.quantize(params, group_size=32, method="rtn", lm_head=True, sink=sink)
    assert [row.name for row in report.kept_float] == ["lm_head"]
    assert "N=100 is not a multiple of 32" in report.kept_float[0].note
    loaded = load_hf(sink.finish(quantized, report))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["lm_head"] is False
    np.testing.assert_array_equal(loaded.lm_head.kernel.get_value(), params.lm_head.kernel.get_value())


def test_a_rule_may_need_tokens_and_may_spare_them():
    with pytest.raises(CalibrationError, match="needs calibration tokens"):
        jgptq.quantize(tiny.decoder(), method="rtn", group_size=32, rules={".*down_proj": {"method": "gptq"}})
    _, report = jgptq.quantize(tiny.decoder(), group_size=32, rules={".*": {"method": "rtn"}})
    assert {row.outcome for row in report.rows} == {"ROUNDED"}


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_resumed_run_with_rules_and_a_head_writes_what_an_uninterrupted_one_does(tmp_path: Path, mixed, after: int):
    params, calib, settings = tiny.decoder(), tiny.tokens(), mixed[0].quantization
    whole = save_hf(mixed[0], tmp_path / "whole", format="gptq_v2")
    stopping = StoppingSink(tmp_path / "out", params, settings, calib, file_format="gptq_v2")
    stopping.after = after
    with pytest.raises(Stopped):
        jgptq.quantize(params, calib, config=settings, sink=stopping)
    again = FolderSink(tmp_path / "out", params, settings, calib, file_format="gptq_v2")
    assert len(again.done()) == after + 1
    out = again.finish(*jgptq.quantize(params, calib, config=settings, sink=again))
    for path in whole.iterdir():
        if path.name == "README.md":  # the sink's has the losses
            continue
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name
    assert [row["name"] for row in json.loads((out / "quantize_report.json").read_text())["linears"]][-1] == "lm_head"


def test_a_run_is_not_continued_with_other_rules_or_another_head(tmp_path: Path):
    params = tiny.decoder()

    def sink(**settings: Any) -> FolderSink:
        return FolderSink(tmp_path / "out", params, QuantizeConfig(group_size=32, method="rtn", **settings), None)

    rules = rules_from_dynamic({".*down_proj": {"bits": 8}, ".*o_proj": {"bits": 8}})
    sink(rules=rules).done()
    for other in ({"rules": rules[::-1]}, {"rules": rules[:1]}, {}, {"rules": rules, "lm_head": True}):
        with pytest.raises(OutputError, match="other settings, tokens or weights"):
            sink(**other)
    assert sink(rules=rules).done() == {}


def as_gptqmodel_reads(dynamic: dict[str, dict], name: str, base: dict[str, Any]) -> dict[str, Any] | None:
    """GPTQModel 7.6 puts the rules that skip before the others, and takes the first that matches."""
    for key, values in sorted(dynamic.items(), key=lambda item: not item[0].startswith("-")):
        if re.match(key[2:], name):
            return None if key.startswith("-") else base | values
    return base


def as_vllm_reads(dynamic: dict[str, dict], name: str, base: dict[str, Any]) -> dict[str, Any] | None:
    """vLLM keeps the order, and asks for the names of fused linears."""
    for key, values in dynamic.items():
        if re.match(key[2:], name):
            return None if key.startswith("-") else base | values
    return base


settings = st.one_of(
    st.none(),
    st.builds(QuantizeConfig, bits=st.sampled_from([4, 8]), group_size=st.sampled_from([32, 128]), sym=st.booleans()),
)


@given(st.lists(st.tuples(settings, settings, settings), min_size=1, max_size=12), settings)
def test_what_is_written_means_the_same_to_every_reader(blocks: list[tuple], head: QuantizeConfig | None):
    linears = {
        f"layers.{index}.{name}": chosen
        for index, block in enumerate(blocks)
        for names, chosen in zip(KINDS, block, strict=True)
        for name in names
    } | {"lm_head": head}
    model = tiny.config(num_hidden_layers=len(blocks))
    written = writer_of("gptq_v2").quantization_config(Written(run=QuantizeConfig(), linears=linears, model=model))
    base = {name: written[name] for name in ("bits", "group_size", "sym")}
    assert written["lm_head"] == (head is not None)
    for path, chosen in linears.items():
        if path == "lm_head" and head is None:
            continue
        name = path if path == "lm_head" else f"model.{path}"
        expected = None if chosen is None else {key: getattr(chosen, key) for key in base}
        parent, _, last = name.rpartition(".")
        fused = f"{parent}.{FUSED[last]}" if last in FUSED else name
        assert as_gptqmodel_reads(written.get("dynamic", {}), name, base) == expected
        assert as_vllm_reads(written.get("dynamic", {}), fused, base) == expected


def foreign(folder: Path, dynamic: Any) -> Path:
    """A folder as another writer leaves it: rules in `dynamic`, and none of ours in `meta`."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= {"dynamic": dynamic, "meta": {"quantizer": ["gptqmodel:7.6.0"]}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.filterwarnings("ignore:vLLM serves", "ignore:GPTQModel loads groups")
def test_rules_of_another_writer_are_read_as_far_as_the_tensors_go(tmp_path: Path):
    quantized, _ = jgptq.quantize(
        tiny.decoder(), method="rtn", group_size=32, rules={".*down_proj": {"bits": 8, "group_size": 96}}
    )
    folder = save_hf(quantized, tmp_path / "out")
    dynamic = {"-:model.visual": {}, "+:.*down_proj": {"bits": 8, "group_size": 96, "mse": 2.4}, ".*down_proj": {"bits": 2}}
    loaded = load_hf(foreign(folder, dynamic))
    assert loaded.quantization.rules == (
        Rule(pattern="model.visual", skip=True),
        Rule(pattern=".*down_proj", bits=8, group_size=96),
    )
    assert_same(quantized, loaded)
    kernel = loaded.layers[0].mlp.down_proj.kernel.get_value()
    assert (kernel.bits, kernel.group_size) == (8, 96)
    assert_same(loaded, load_hf(save_hf(loaded, tmp_path / "again")))


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        ([1], "dynamic: expected an object or null, found"),
        ({"(": {}}, "must be a regex"),
        ({"a": {"bits": "x"}}, "bits must be int"),
    ],
)
def test_rules_of_a_folder_that_cannot_be_read_name_the_file(tmp_path: Path, dynamic: Any, message: str):
    quantized, _ = jgptq.quantize(tiny.decoder(), method="rtn", group_size=32)
    with pytest.raises(CheckpointError, match=rf"config\.json.*{message}"):
        load_hf(foreign(save_hf(quantized, tmp_path / "out"), dynamic))


def test_no_rules_are_stored_as_none():
    assert stored_rules(None) == stored_rules({}) == ()


def test_readers_that_refuse_a_rule_are_warned_of():
    rules = rules_from_dynamic({"a": {"bits": 3}, "b": {"group_size": 96}, "-:c": {}, "d": {"bits": 8}})
    warnings = writer_of("gptq").warnings(QuantizeConfig(rules=rules), tiny.config())
    assert [warning.split()[0] for warning in warnings] == ["vLLM", "vLLM", "GPTQModel", "transformers"]
    assert [warning.split()[0] for warning in writer_of("gptq").warnings(QuantizeConfig(lm_head=True), tiny.config())] == [
        "transformers"
    ]
    assert writer_of("float").warnings(QuantizeConfig(rules=rules, lm_head=True), tiny.config()) == []


def test_v1_refuses_an_asymmetric_rule():
    with pytest.raises(ConfigError, match="use 'gptq_v2'"):
        check_format("gptq", QuantizeConfig(rules=(Rule(pattern="a", sym=False),)))
    assert check_format("gptq", QuantizeConfig(rules=(Rule(pattern="a", skip=True),))) == writer_of("gptq")
