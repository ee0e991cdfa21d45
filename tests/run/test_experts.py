"""Experts in the driver: what each is solved on, and what happens to those that saw few tokens."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import sparse
import tiny

import jgptq
from converters import FolderSink, load_hf
from jgptq.errors import ConfigError, NumericalError
from jgptq.models import RESIDUAL, Decoder, single_linears
from jgptq.models.mixture.leaves import PackedExperts
from jgptq.models.packed import PackedTensor
from jgptq.run import expert_solve
from jgptq.solver import solve

SETTINGS = {"bits": 3, "group_size": 32}
FAST = SETTINGS | {"preset": "fast", "min_tokens_per_feature": 0.0}
OPENING = ("mlp.experts.gate_proj", "mlp.experts.up_proj")
pytestmark = pytest.mark.filterwarnings("ignore:vLLM refuses 3-bit")


def kernels(block, path: str) -> np.ndarray:
    """The float32 kernels `[E, K, N]` of a stack."""
    kernel = block.linears()[path].kernel.get_value()
    return np.asarray(kernel.dequantize() if isinstance(kernel, PackedExperts) else kernel, np.float32)


def stage_of(block, path: str):
    return next(stage for stage in block.stages() if path in stage.linears)


def expert_inputs(
    params: Decoder, quantized: Decoder, calib: np.ndarray, index: int, everyone: bool
) -> dict[str, list[np.ndarray]]:
    """What the linears of each expert of a block read, `[T, K]`, by hand: the blocks before it are quantized, and so is all of
    the block that comes before. With `everyone`, as if all tokens were routed to each."""
    residual = params.embed(jnp.asarray(calib))
    for block in list(quantized.layers)[:index]:
        residual = block(residual)
    block = quantized.layers[index]
    carry = {RESIDUAL: residual}
    for stage in block.stages():
        if stage.routing is not None:
            break
        carry = block.run(stage, carry)
    h_td = np.asarray(block.mlp_norm(carry[RESIDUAL]), np.float32).reshape(-1, 64)
    chosen_tk = sparse.chosen_experts(
        h_td, np.asarray(block.mlp.router.kernel.get_value()), params.config.experts.experts_per_token
    )
    gate, up = (kernels(block, path) for path in OPENING)
    read: dict[str, list[np.ndarray]] = {"open": [], "close": []}
    for expert in range(params.config.experts.num_experts):
        mine_tk = h_td if everyone else h_td[(chosen_tk == expert).any(axis=1)]
        opened = mine_tk @ gate[expert]
        read["open"].append(mine_tk)
        read["close"].append(opened / (1 + np.exp(-opened)) * (mine_tk @ up[expert]))
    return read


def hessian_of(h_tk: np.ndarray) -> np.ndarray:
    return 2 / max(len(h_tk), 1) * h_tk.T.astype(np.float64) @ h_tk.astype(np.float64)


def share_of_other_codes(params: Decoder, quantized: Decoder, index: int, path: str, hessians: list[np.ndarray]) -> list[float]:
    """How many weights of each expert differ from those that the ordinary solver finds on a Hessian."""
    solved, config = kernels(quantized.layers[index], path), jgptq.QuantizeConfig(**SETTINGS)
    original = kernels(params.layers[index], path)
    parts = []
    for expert, h_kk in enumerate(hessians):
        expected = solve(jnp.asarray(original[expert]), jnp.asarray(h_kk, jnp.float32), config).dequantize()
        parts.append(float(np.mean(np.abs(solved[expert] - np.asarray(expected)) > 1e-5)))
    return parts


@pytest.mark.parametrize("form", ["qwen3_moe", "qwen2_moe"])
def test_each_expert_is_solved_on_the_tokens_that_the_quantized_model_routes_to_it(form: str):
    params, calib = tiny.decoder(**sparse.FORMS[form]), tiny.tokens()
    quantized, report = jgptq.quantize(params, calib, **FAST)
    read = expert_inputs(params, quantized, calib, 1, everyone=False)
    for path, which in ((OPENING[0], "open"), (OPENING[1], "open"), ("mlp.experts.down_proj", "close")):
        assert max(share_of_other_codes(params, quantized, 1, path, list(map(hessian_of, read[which])))) < 0.03
    counts = [row.tokens for row in report.rows if row.name.startswith("layers.1.mlp.experts.") and "down" in row.name]
    assert counts == [len(h_tk) for h_tk in read["open"]]
    assert len(set(counts)) > 1


def test_chunks_of_experts_give_the_codes_of_all_at_once(monkeypatch: pytest.MonkeyPatch):
    params = tiny.decoder(**sparse.QWEN3_MOE)
    whole, _ = jgptq.quantize(params, tiny.tokens(), **FAST)
    monkeypatch.setattr(expert_solve, "_CHUNK_BYTES", 1)
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


STARVING = SETTINGS | {"preset": "fast", "min_tokens_per_feature": 3.0}


def starved_run(params: Decoder, **settings):
    quantized, report = jgptq.quantize(params, tiny.tokens(), **STARVING | settings)
    rows = [row for row in report.rows if row.name.startswith("layers.0.mlp.experts.") and row.name.endswith("gate_proj")]
    starved = np.array([row.tokens < 3 * 64 for row in rows])
    assert 0 < starved.sum() < len(rows)
    assert [bool(row.note) for row in rows] == starved.tolist()
    return quantized, rows, starved


@pytest.mark.parametrize(("path", "which"), [(OPENING[1], "open"), ("mlp.experts.down_proj", "close")])
def test_a_starved_expert_is_solved_on_a_mixture_with_the_mean_of_its_layer(path: str, which: str):
    params = tiny.decoder(**sparse.QWEN3_MOE)
    quantized, rows, _ = starved_run(params, starved_experts="shrink")
    read = expert_inputs(params, quantized, tiny.tokens(), 0, everyone=False)[which]
    mean_kk = hessian_of(np.concatenate(read))
    own = [min(1.0, len(h_tk) / (3 * 64)) for h_tk in read]
    hessians = [part * hessian_of(h_tk) + (1 - part) * mean_kk for part, h_tk in zip(own, read, strict=True)]
    assert max(share_of_other_codes(params, quantized, 0, path, hessians)) < 0.03
    assert any("its Hessian was mixed with the mean of its layer" in row.note for row in rows)


@pytest.mark.parametrize(("path", "which"), [(OPENING[1], "open"), ("mlp.experts.down_proj", "close")])
def test_a_starved_expert_is_solved_on_all_tokens(path: str, which: str):
    params = tiny.decoder(**sparse.QWEN3_MOE)
    quantized, rows, starved = starved_run(params, starved_experts="all_tokens")
    own, every = (expert_inputs(params, quantized, tiny.tokens(), 0, everyone=all_)[which] for all_ in (False, True))
    hessians = [hessian_of(every[expert] if starved[expert] else own[expert]) for expert in range(4)]
    assert max(share_of_other_codes(params, quantized, 0, path, hessians)) < 0.03
    assert any("it was solved on all tokens" in row.note for row in rows)


def test_a_starved_expert_is_rounded_to_nearest():
    params = tiny.decoder(**sparse.QWEN3_MOE)
    quantized, rows, starved = starved_run(params, starved_experts="rtn")
    nearest, _ = jgptq.quantize(params, method="rtn", **SETTINGS)
    same = np.all(kernels(quantized.layers[0], OPENING[0]) == kernels(nearest.layers[0], OPENING[0]), axis=(1, 2))
    assert same.tolist() == starved.tolist() == [row.outcome == "ROUNDED" for row in rows]


@pytest.mark.parametrize(("choice", "order"), [("shrink", "group"), ("all_tokens", "group"), ("rtn", "desc_act")])
def test_an_expert_without_a_token_is_packed_all_the_same(choice: str, order: str):
    params = tiny.decoder(**sparse.QWEN3_MOE)
    router = params.layers[0].mlp.router.kernel
    router.set_value(jnp.zeros_like(router.get_value()))  # equal scores: the first two experts are chosen
    settings = SETTINGS | {"preset": "fast", "starved_experts": choice, "order": order, "min_tokens_per_feature": 0.0}
    quantized, report = jgptq.quantize(params, tiny.tokens(), **settings)
    rows = {row.name: row for row in report.rows}
    empty = [name for name, row in rows.items() if row.tokens == 0]
    assert empty == [f"layers.0.mlp.experts.{expert}.{kind}_proj" for kind in ("gate", "up", "down") for expert in (2, 3)]
    for name in empty:
        assert rows[name].outcome in ("SOLVED", "ROUNDED", "RAISED_DAMPING")
        assert rows[name].note.startswith("0 tokens were routed to this expert")
    for block in quantized.layers:
        for path, linear in block.linears().items():
            for _, single in single_linears(path, linear):
                assert isinstance(single.kernel.get_value(), PackedTensor)
    assert np.all(np.isfinite(quantized(jnp.asarray(tiny.tokens(4)))))


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


def test_a_rule_chooses_what_happens_to_the_starved_experts_of_one_layer():
    params = tiny.decoder(**sparse.QWEN3_MOE)
    rules = {r"+:.*layers\.0\..*experts": {"starved_experts": "rtn"}}
    _, report = jgptq.quantize(params, tiny.tokens(), rules=rules, **STARVING)
    notes = {
        layer: {row.note for row in report.rows if row.name.startswith(f"layers.{layer}.mlp") and row.note} for layer in (0, 1)
    }
    assert all("rounded to nearest" in note for note in notes[0])
    assert all("mixed with the mean" in note for note in notes[1])
    assert notes[0]
    assert notes[1]


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
