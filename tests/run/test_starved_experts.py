"""Experts that saw few calibration tokens: each of the ways in which they are solved, against the solver by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
import sparse
import tiny
from sparse import OPENING, expert_inputs, hessian_of, kernels, share_of_other_codes

import jgptq
from jgptq.models import Decoder, single_linears
from jgptq.models.packed import PackedTensor

SETTINGS = {"bits": 3, "group_size": 32}
CONFIG = jgptq.QuantizeConfig(**SETTINGS)
pytestmark = pytest.mark.filterwarnings("ignore:vLLM refuses 3-bit")


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
    assert max(share_of_other_codes(params, quantized, 0, path, hessians, CONFIG)) < 0.03
    assert any("its Hessian was mixed with the mean of its layer" in row.note for row in rows)


@pytest.mark.parametrize(("path", "which"), [(OPENING[1], "open"), ("mlp.experts.down_proj", "close")])
def test_a_starved_expert_is_solved_on_all_tokens(path: str, which: str):
    params = tiny.decoder(**sparse.QWEN3_MOE)
    quantized, rows, starved = starved_run(params, starved_experts="all_tokens")
    own, every = (expert_inputs(params, quantized, tiny.tokens(), 0, everyone=all_)[which] for all_ in (False, True))
    hessians = [hessian_of(every[expert] if starved[expert] else own[expert]) for expert in range(4)]
    assert max(share_of_other_codes(params, quantized, 0, path, hessians, CONFIG)) < 0.03
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
