"""Experts in the driver: what each is solved on, and what happens to those that saw few tokens."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import sparse
import tiny
from sparse import OPENING, expert_inputs, hessian_of, kernels, share_of_other_codes

import jgptq
from converters import FolderSink, load_hf
from jgptq.errors import ConfigError, NumericalError
from jgptq.models.memory import to_device
from jgptq.run.batches import Observation, advance, embed
from jgptq.run.experts import solve
from jgptq.run.plan import plan_run
from jgptq.solver import ONE_DEVICE
from jgptq.solver.mesh import OnMesh, make_mesh

SETTINGS = {"bits": 3, "group_size": 32}
CONFIG = jgptq.QuantizeConfig(**SETTINGS)
CLOSING = "mlp.experts.down_proj"
FAST = SETTINGS | {"preset": "fast", "min_tokens_per_feature": 0.0}
pytestmark = pytest.mark.filterwarnings("ignore:vLLM refuses 3-bit")


UNGROUPED = dataclasses.replace(sparse.DEEPSEEK["experts"], groups=1, kept_groups=1, corrected=False)
FORMS = sparse.FORMS | {"latent": sparse.DEEPSEEK | {"experts": UNGROUPED}}


@pytest.mark.parametrize("form", ["qwen3_moe", "qwen2_moe", "latent"])
def test_each_expert_is_solved_on_the_tokens_that_the_quantized_model_routes_to_it(form: str):
    params, calib = tiny.decoder(**FORMS[form]), tiny.tokens()
    quantized, report = jgptq.quantize(params, calib, **FAST)
    read = expert_inputs(params, quantized, calib, 1, everyone=False)
    for path, which in ((OPENING[0], "open"), (OPENING[1], "open"), ("mlp.experts.down_proj", "close")):
        assert max(share_of_other_codes(params, quantized, 1, path, list(map(hessian_of, read[which])), CONFIG)) < 0.03
    counts = [row.tokens for row in report.rows if row.name.startswith("layers.1.mlp.experts.") and "down" in row.name]
    assert counts == [len(h_tk) for h_tk in read["open"]]
    assert len(set(counts)) > 1


def test_the_float_model_follows_the_routing_also_where_it_is_a_stage_ahead():
    params = tiny.decoder(**sparse.QWEN3_MOE)
    reference, work = to_device(params.layers[0]), to_device(params.layers[0])
    work.self_attn.o_proj.kernel.set_value(-work.self_attn.o_proj.kernel.get_value() * 9)
    batches = embed(params, [tiny.tokens(2)], reference=True)
    advance(work, reference, batches, 0, Observation(drift=True, placement=ONE_DEVICE, pull=1.0))
    own = reference.run(reference.stages()[1], batches[0].carry)["routing"]
    advance(work, reference, batches, 1, None, pulled=True)
    routing = batches[0].carry["routing"]
    assert not np.array_equal(routing.rows_e, own.rows_e)
    np.testing.assert_array_equal(batches[0].reference["routing"].expert_c, routing.expert_c)
    np.testing.assert_array_equal(batches[0].reference["routing"].place_tk, routing.place_tk)


def test_no_stage_of_experts_is_observed_a_stage_ahead():
    wide = dataclasses.replace(sparse.QWEN2_MOE["experts"], width=128)  # the last linears have more inputs than outputs
    dense, mixture = plan_run(tiny.decoder(**sparse.QWEN2_MOE | {"experts": wide}), CONFIG).plans
    assert [stage.pulls for stage in dense] == [False, False, False, True]
    assert [(stage.names[0], stage.pulls) for stage in mixture if stage.sums_itself] == [(OPENING[0], False), (CLOSING, False)]


def test_chunks_of_experts_give_the_codes_of_all_at_once(monkeypatch: pytest.MonkeyPatch):
    params = tiny.decoder(**sparse.QWEN3_MOE)
    whole, _ = jgptq.quantize(params, tiny.tokens(), **FAST)
    monkeypatch.setattr(solve, "_CHUNK_BYTES", 1)
    chunked, report = jgptq.quantize(params, tiny.tokens(), **FAST)
    for path in OPENING:  # what follows reads what one code that falls the other way at a tie has moved
        assert np.mean(np.abs(kernels(whole.layers[0], path) - kernels(chunked.layers[0], path)) > 1e-5) < 0.02
    assert [row.name for row in report.rows][4:7] == [f"layers.0.mlp.experts.{expert}.gate_proj" for expert in range(3)]


@pytest.mark.parametrize("settings", [{}, {"method": "qronos", "order": "desc_act"}])
def test_experts_are_fitted_to_the_float_model_as_other_linears_are(settings: dict):
    params, calib = tiny.decoder(**sparse.QWEN3_MOE), tiny.tokens(48)
    quantized, report = jgptq.quantize(params, calib, **SETTINGS, **settings)
    nearest, _ = jgptq.quantize(params, method="rtn", **SETTINGS)
    experts = [row for row in report.rows if ".experts." in row.name]
    assert len(experts) == 2 * 4 * 3
    assert all(row.outcome == "SOLVED" and 0 < row.loss < row.rtn_loss for row in experts)
    held_out = jnp.asarray(tiny.tokens(16, seed=9))
    errors = [float(jnp.linalg.norm((model(held_out) - params(held_out)).reshape(-1))) for model in (quantized, nearest)]
    assert errors[0] < 0.95 * errors[1]


def test_rules_speak_of_experts_by_name_and_may_not_part_them():
    params = tiny.decoder(**sparse.QWEN3_MOE)
    quantized, report = jgptq.quantize(
        params, method="rtn", group_size=32, rules={"+:.*experts.*down_proj": {"bits": 8}, "-:.*layers.1.mlp.experts": {}}
    )
    assert quantized.layers[0].mlp.experts.down_proj.kernel.get_value().stack.bits == 8
    assert quantized.layers[0].mlp.experts.up_proj.kernel.get_value().stack.bits == 4
    kept = [row.name for row in report.kept_float]
    assert len(kept) == 8
    assert kept[0] == "layers.1.mlp.experts.0.gate_proj"
    with pytest.raises(ConfigError, match=r"readers serve the experts of a layer as one matrix.*experts\.3\.down_proj: bits=8"):
        jgptq.quantize(params, method="rtn", group_size=32, rules={r"+:.*experts\.3\.down_proj": {"bits": 8}})


def test_experts_that_cannot_be_solved_are_named_unless_rounding_is_allowed():
    params = tiny.decoder(**sparse.QWEN3_MOE)
    scale = params.layers[0].mlp_norm.scale
    scale.set_value(jnp.zeros_like(scale.get_value()))
    with pytest.raises(NumericalError, match=r"(?s)experts\.0\.gate_proj.*The Hessian is zero.*allow_rtn_fallback"):
        jgptq.quantize(params, tiny.tokens(), **FAST)
    _, report = jgptq.quantize(params, tiny.tokens(), allow_rtn_fallback=True, **FAST)
    rounded = [row for row in report.rows if row.outcome == "ROUNDED"]
    assert len(rounded) == 12
    assert all("The Hessian is zero" in row.note for row in rounded)


@pytest.mark.parametrize("tune", [0, 2])
def test_a_resumed_run_writes_what_an_uninterrupted_one_does(tmp_path: Path, tune: int):
    checkpoint = load_hf(tiny.folder(tmp_path / "model", **sparse.QWEN2_MOE))
    calib, settings = tiny.tokens(), jgptq.QuantizeConfig(**SETTINGS, tune=tune)

    class Stopped(Exception):
        pass

    class StoppingSink(FolderSink):
        def write(self, index, block, rows):
            super().write(index, block, rows)
            if index == 0:
                raise Stopped

    whole = FolderSink(tmp_path / "whole", checkpoint, settings, calib)
    quantized, report = jgptq.quantize(checkpoint, calib, config=settings, sink=whole)
    whole.finish(quantized, report)
    with pytest.raises(Stopped):
        jgptq.quantize(checkpoint, calib, config=settings, sink=StoppingSink(tmp_path / "again", checkpoint, settings, calib))
    again = FolderSink(tmp_path / "again", checkpoint, settings, calib)
    again.finish(*jgptq.quantize(checkpoint, calib, config=settings, sink=again))
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    loaded = load_hf(tmp_path / "whole")
    tokens = jnp.asarray(tiny.tokens(2))
    np.testing.assert_allclose(loaded(tokens), quantized(tokens), atol=1e-5)
    assert dataclasses.replace(loaded.quantization, allow_rtn_fallback=False) == settings


def test_a_mesh_is_refused():
    mesh = OnMesh(make_mesh(data=1, model=1))
    with pytest.raises(ConfigError, match="a model with experts is solved on one device"):
        jgptq.quantize(tiny.decoder(**sparse.QWEN3_MOE), tiny.tokens(), placement=mesh)
