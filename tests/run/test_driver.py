"""The driver: what it solves, on what inputs, and what it does when something is wrong."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import jgptq
from jgptq.errors import CalibrationError, ConfigError, NumericalError
from jgptq.models import RESIDUAL, Block
from jgptq.models.packed import PackedTensor, unpack
from jgptq.run import plan, tiles
from jgptq.solver import solve
from jgptq.solver.statistics.hessian import accumulate, empty, hessian

SETTINGS = {"bits": 3, "group_size": 32}
pytestmark = pytest.mark.filterwarnings("ignore:vLLM refuses 3-bit")


def linears(block: Block) -> dict:
    return block.linears()


def same_leaves(left, right) -> bool:
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)


FORMS = {
    "llama": {},
    "opt": tiny.OPT,
    "opt-350m": tiny.OPT_350M,
    "parallel": {"block_form": "parallel"},
    "output": {"block_form": "output", "qk_norm": "width"},
    "gemma2": tiny.GEMMA2,
    "gemma3": tiny.GEMMA3,
    "granite": tiny.GRANITE,
    "cohere": tiny.COHERE,
    "phi": tiny.PHI,
    "olmo": tiny.OLMO,
    "smollm3": tiny.SMOLLM3,
    "gpt2": tiny.GPT2,
    "gpt-neox": tiny.NEOX,
    "phi3": tiny.PHI3,
    "latent": tiny.LATENT,
}


@pytest.mark.parametrize("changes", FORMS.values(), ids=FORMS.keys())
def test_every_linear_is_solved_on_what_the_quantized_layers_before_it_produce(changes: dict):
    """A forward pass by hand, layer by layer over all samples at once, gives the driver's codes."""
    params, calib = tiny.decoder(**changes), tiny.tokens()
    quantized, _ = jgptq.quantize(params, calib, preset="fast", **SETTINGS)
    carry = {RESIDUAL: params.embed(jnp.asarray(calib))}
    for block, packed in zip(params.layers, quantized.layers, strict=True):
        for stage in block.stages():
            h = block.inputs(stage, carry)
            h_kk = hessian(accumulate(empty(h.shape[-1]), h))
            for path in stage.linears:
                w_kn = jnp.asarray(block.linears()[path].kernel.get_value(), jnp.float32)
                expected = solve(w_kn, h_kk, jgptq.QuantizeConfig(**SETTINGS)).dequantize()
                solved = packed.linears()[path].kernel.get_value().dequantize()
                assert np.mean(np.abs(np.asarray(solved - expected)) > 1e-5) < 0.02
            carry = packed.combine(stage, carry, {path: packed.linears()[path](h) for path in stage.linears})


def test_a_decoder_that_is_served_or_quantized_is_refused_before_anything_else():
    quantized, _ = jgptq.quantize(tiny.decoder(), method="rtn", bits=4, group_size=32)
    for params in (quantized, jgptq.for_serving(quantized)):
        with pytest.raises(ConfigError, match="the decoder is quantized already; start from the float checkpoint"):
            jgptq.quantize(params, None, rules={"+:.*k_proj": {"bits": 8}}, lm_head=True)


def test_report_has_a_row_per_linear_with_losses_below_rtn():
    _, report = jgptq.quantize(tiny.decoder(), tiny.tokens(), **SETTINGS)
    assert [row.name for row in report.rows][:3] == [f"layers.0.self_attn.{name}_proj" for name in "qkv"]
    assert len(report.rows) == 14
    for row in report.rows:
        assert row.outcome == "SOLVED"
        assert 0 < row.loss < row.rtn_loss
        assert row.tokens == 24 * 16
        assert row.damping == pytest.approx(0.01)
    assert report.worse_than_rtn == ()


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": True}, {"qkv_bias": True, "mlp_bias": True}, {"qk_norm": "head"}])
def test_only_kernels_of_blocks_change(changes: dict):
    params = tiny.decoder(**changes)
    quantized, _ = jgptq.quantize(params, tiny.tokens(), **SETTINGS)
    for left, right in ((params.embed_tokens, quantized.embed_tokens), (params.norm, quantized.norm)):
        assert same_leaves(left, right)
    for before, after in zip(params.layers, quantized.layers, strict=True):
        for name, linear in linears(after).items():
            assert isinstance(linear.kernel.get_value(), PackedTensor)
            if linear.bias is not None:
                np.testing.assert_array_equal(linear.bias.get_value(), linears(before)[name].bias.get_value())


def test_gptq_keeps_the_logits_closer_than_rounding():
    params, calib = tiny.decoder(), tiny.tokens(64)
    held_out = jnp.asarray(tiny.tokens(16, seed=9))
    gptq, _ = jgptq.quantize(params, calib, **SETTINGS)
    rtn, _ = jgptq.quantize(params, method="rtn", **SETTINGS)
    errors = [float(jnp.linalg.norm((model(held_out) - params(held_out)).reshape(-1))) for model in (gptq, rtn)]
    assert errors[0] < 0.95 * errors[1]


def test_batch_size_does_not_matter_beyond_rounding():
    # Where targets are shifted, one code that falls the other way at a tie moves all targets after it a little.
    params, calib, settings = tiny.decoder(), tiny.tokens(), SETTINGS | {"preset": "fast"}
    one, _ = jgptq.quantize(params, calib, batch_size=1, **settings)
    all_at_once, _ = jgptq.quantize(params, calib, batch_size=24, **settings)
    for left, right in zip(one.layers, all_at_once.layers, strict=True):
        for name, linear in linears(left).items():
            difference = linear.kernel.get_value().dequantize() - linears(right)[name].kernel.get_value().dequantize()
            assert float(jnp.mean((jnp.abs(difference) > 1e-5).astype(jnp.float32))) < 0.02


def test_bfloat16_activations_cost_little():
    calib = tiny.tokens(64)
    wide, _ = jgptq.quantize(tiny.decoder(), calib, **SETTINGS)
    narrow, report = jgptq.quantize(tiny.decoder(dtype=jnp.bfloat16), calib, **SETTINGS)
    assert narrow.embed(jnp.asarray(calib[:1])).dtype == jnp.float32  # the leaves' dtype is not the activations'
    params = tiny.decoder()
    params.config = dataclasses.replace(params.config, dtype="bfloat16")
    narrow, report = jgptq.quantize(params, calib, **SETTINGS)
    assert narrow.embed(jnp.asarray(calib[:1])).dtype == jnp.bfloat16
    held_out = jnp.asarray(tiny.tokens(16, seed=9))
    exact = tiny.decoder()(held_out)
    errors = [float(jnp.linalg.norm((model(held_out) - exact).reshape(-1))) for model in (wide, narrow)]
    assert errors[1] < 1.2 * errors[0]
    assert not any(row.outcome != "SOLVED" for row in report.rows)


def test_blocks_of_one_shape_share_one_compilation():
    params = tiny.decoder(num_hidden_layers=4, layer_windows=(None,) * 4)
    jgptq.quantize(tiny.decoder(), tiny.tokens(), **SETTINGS)
    before = tiles._solve_tile._cache_size()
    jgptq.quantize(params, tiny.tokens(), **SETTINGS)
    assert tiles._solve_tile._cache_size() == before


def test_rtn_needs_no_tokens_and_gptq_does():
    _, report = jgptq.quantize(tiny.decoder(), method="rtn", **SETTINGS)
    assert {row.outcome for row in report.rows} == {"ROUNDED"}
    assert all(row.loss is None and row.tokens == 0 for row in report.rows)
    with pytest.raises(CalibrationError, match="needs calibration tokens"):
        jgptq.quantize(tiny.decoder(), **SETTINGS)


def test_a_linear_of_an_odd_width_stays_float_with_all_of_its_stage_and_is_named():
    params = tiny.decoder(intermediate_size=100)
    quantized, report = jgptq.quantize(params, tiny.tokens(), **SETTINGS)
    assert {row.name.rpartition(".")[2] for row in report.kept_float} == {"gate_proj", "up_proj", "down_proj"}
    assert all("100 is not a multiple of 32" in row.note for row in report.kept_float)
    assert same_leaves(params.layers[1].mlp, quantized.layers[1].mlp)


def test_a_group_size_that_does_not_fit_is_refused_with_those_that_do():
    with pytest.raises(ConfigError, match=r"K=64.*Sizes that fit every linear: -1, 32$"):
        jgptq.quantize(tiny.decoder(), tiny.tokens(), group_size=128)


def test_a_decoder_without_a_packable_linear_is_refused():
    with pytest.raises(ConfigError, match="no linear can be packed"):
        jgptq.quantize(tiny.decoder(hidden_size=60, intermediate_size=100), tiny.tokens(), group_size=32)


@pytest.mark.parametrize(
    ("calib", "message"),
    [
        (np.full((4, 8), tiny.VOCAB), r"ids in \[0, 96\)"),
        (np.full((4, 8), -1), r"ids in \[0, 96\)"),
        (np.zeros((0, 8), np.int32), "no tokens at all"),
        (np.zeros(8, np.int32), r"must be \[samples, seq_len\]"),
    ],
)
def test_tokens_that_cannot_be_used_are_refused(calib: np.ndarray, message: str):
    with pytest.raises(CalibrationError, match=message):
        jgptq.quantize(tiny.decoder(), calib, **SETTINGS)


def test_unknown_settings_are_refused_with_those_known():
    with pytest.raises(ConfigError, match="unknown settings groupsize; known are preset, bits, group_size"):
        jgptq.quantize(tiny.decoder(), tiny.tokens(), groupsize=32)
    with pytest.raises(ConfigError, match="not both"):
        jgptq.quantize(tiny.decoder(), tiny.tokens(), config=jgptq.QuantizeConfig(), bits=3)


def test_a_quantized_decoder_is_not_quantized_again():
    quantized, _ = jgptq.quantize(tiny.decoder(), method="rtn", **SETTINGS)
    with pytest.raises(ConfigError, match="quantized already"):
        jgptq.quantize(quantized, tiny.tokens(), **SETTINGS)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(value: float):
    params = tiny.decoder()
    kernel = params.layers[1].self_attn.k_proj.kernel
    kernel.set_value(kernel.get_value().at[3, 5].set(value))
    for method in ("gptq", "rtn"):
        with pytest.raises(NumericalError, match=r"^layers\.1\.self_attn\.k_proj\.kernel: The weights hold NaN"):
            jgptq.quantize(params, tiny.tokens(), method=method, **SETTINGS)


def test_activations_that_are_not_finite_are_named_where_they_are_read():
    params = tiny.decoder()
    scale = params.layers[1].mlp_norm.scale
    scale.set_value(jnp.full(scale.get_value().shape, 3e38, jnp.float32))  # finite, and overflows what it multiplies
    with pytest.raises(NumericalError, match=r"layers\.1\.mlp\.gate_proj, layers\.1\.mlp\.up_proj: The activations hold NaN"):
        jgptq.quantize(params, tiny.tokens(), **SETTINGS)


def test_a_linear_without_input_is_an_error_unless_rounding_is_allowed():
    params = tiny.decoder()
    scale = params.layers[0].mlp_norm.scale
    scale.set_value(jnp.zeros_like(scale.get_value()))
    with pytest.raises(NumericalError, match=r"(?s)layers\.0\.mlp\.gate_proj.*The Hessian is zero.*allow_rtn_fallback"):
        jgptq.quantize(params, tiny.tokens(), **SETTINGS)
    _, report = jgptq.quantize(params, tiny.tokens(), allow_rtn_fallback=True, **SETTINGS)
    rounded = [row for row in report.rows if row.outcome == "ROUNDED"]
    assert [row.name for row in rounded] == [f"layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert all("The Hessian is zero" in row.note for row in rounded)


@pytest.mark.parametrize(
    ("path", "method"),
    [
        ("embed_tokens.embedding", "gptq"),
        ("norm.scale", "rtn"),
        ("lm_head.kernel", "rtn"),
        ("layers.1.mlp.up_proj.bias", "rtn"),
    ],
)
def test_every_leaf_that_is_not_finite_is_named(path: str, method: str):
    params = tiny.decoder(mlp_bias=True)
    module = params.layers[1].mlp.up_proj if path.startswith("layers") else getattr(params, path.split(".")[0])
    param = getattr(module, path.rpartition(".")[2])
    param.set_value(param.get_value().at[0].set(np.nan))
    with pytest.raises(NumericalError, match=rf"^{re.escape(path)}: The weights hold NaN"):
        jgptq.quantize(params, tiny.tokens(), method=method, **SETTINGS)


@pytest.mark.parametrize("target_shift", [0.0, 1.0])
def test_what_the_residual_stream_lost_is_made_up_for_whatever_the_inputs_count(target_shift: float):
    def codes(residual_shift: float) -> np.ndarray:
        shifts = {"target_shift": target_shift, "residual_shift": residual_shift}
        quantized, _ = jgptq.quantize(tiny.decoder(), tiny.tokens(), **SETTINGS, **shifts)
        return np.concatenate([np.asarray(block.mlp.down_proj.kernel.get_value().qweight) for block in quantized.layers])

    assert not np.array_equal(codes(0.0), codes(1.0))


@pytest.mark.parametrize("changes", [{}, tiny.OPT], ids=["llama", "opt"])
def test_what_a_stage_gives_in_the_float_model_serves_as_the_drift_of_its_inputs(monkeypatch: pytest.MonkeyPatch, changes: dict):
    """Of a linear that is narrower than its inputs one sum is enough; with the drift of the inputs as a sum of its own, codes
    are the same but for ties."""
    params, plan_stage = tiny.decoder(**changes), plan._plan_stage
    for linear in params.layers[0].linears().values():
        if linear.bias is not None:
            linear.bias.set_value(jnp.arange(len(linear.bias.get_value())) / 32)

    def codes() -> np.ndarray:
        """Of the first block: those of the second would follow each tie of the first."""
        quantized, _ = jgptq.quantize(params, tiny.tokens(), **SETTINGS)
        kernels = [linear.kernel.get_value() for linear in quantized.layers[0].linears().values()]
        return np.concatenate([np.asarray(unpack(kernel)[0]).reshape(-1) for kernel in kernels])

    def pulls() -> list[bool]:
        return [stage.pulls for stage in plan.plan_run(params, jgptq.QuantizeConfig(**SETTINGS)).plans[0]]

    assert pulls() == [False, False, False, True]
    pulled = codes()
    monkeypatch.setattr(plan, "_plan_stage", lambda *args: dataclasses.replace(plan_stage(*args), pulls=False))
    assert pulls() == [False] * 4
    assert np.mean(pulled != codes()) < 0.01
