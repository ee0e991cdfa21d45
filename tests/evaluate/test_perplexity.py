"""Perplexity against a sum by hand."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import jgptq
from converters import load_hf
from jgptq.errors import CalibrationError, NumericalError
from jgptq.evaluate.perplexity import score
from jgptq.models import Decoder
from jgptq.models.memory import copy_module

DATA = Path("../shared/data/stories260k")


@pytest.fixture(scope="module")
def params() -> Decoder:
    return tiny.decoder(dtype=jnp.float32)


forward = jax.jit(lambda params, tokens: params(tokens))


def losses(params: Decoder, window: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of each token but the first of up to 16; what fills up the window is not seen by those before."""
    filled = np.zeros((1, 16), np.int32)
    filled[0, : len(window)] = window
    logits = np.asarray(forward(params, jnp.asarray(filled)), np.float64)[0, : len(window) - 1]
    logits -= logits.max(axis=-1, keepdims=True)
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return -log_probabilities[np.arange(len(window) - 1), window[1:]]


def test_windows_that_do_not_overlap_drop_the_rest_as_in_the_literature(params: Decoder):
    stream = tiny.tokens(1, 53)[0]
    expected = np.concatenate([losses(params, stream[start : start + 16]) for start in (0, 16, 32)])
    result = score(params, stream, 16)
    assert result.tokens == 45
    assert result.nll == pytest.approx(expected.sum(), rel=1e-5)
    assert jgptq.perplexity(params, stream, 16) == pytest.approx(np.exp(expected.mean()), rel=1e-5)


@settings(max_examples=12, deadline=None)
@given(st.integers(2, 60), st.integers(1, 16))
def test_a_stride_predicts_every_token_once_with_all_its_window_as_context(params: Decoder, length: int, stride: int):
    stream = tiny.tokens(1, 60, seed=3)[0][:length]
    expected, predicted, start = [], 1, 0
    while predicted < length:
        stop = min(start + 16, length)
        first = max(predicted, start + 1)
        expected += list(losses(params, stream[start:stop])[first - start - 1 :])
        predicted, start = stop, start + stride
    result = score(params, stream, 16, stride)
    assert result.tokens == len(expected)
    assert result.nll == pytest.approx(sum(expected), rel=1e-4)
    if stride < 16:
        assert result.tokens == length - 1


@pytest.mark.parametrize(
    ("tokens", "seq_len", "stride", "message"),
    [
        (np.zeros(10, np.int32), 16, None, "do not fill a window of 16"),
        (np.zeros(0, np.int32), 16, None, "no tokens at all"),
        (np.full(20, tiny.VOCAB), 16, None, r"ids in \[0, 96\)"),
        (np.zeros((2, 20), np.int32), 16, None, r"one stream \[T\]"),
        (np.zeros(20, np.int32), 1, None, "seq_len must be at least 2"),
        (np.zeros(20, np.int32), 16, 17, "stride 1 to seq_len"),
        (np.zeros(20, np.int32), 16, 0, "stride 1 to seq_len"),
    ],
)
def test_tokens_and_windows_that_cannot_be_used_are_refused(params, tokens, seq_len, stride, message: str):
    with pytest.raises(CalibrationError, match=message):
        score(params, tokens, seq_len, stride)


def test_logits_that_are_nan_are_an_error():
    broken = tiny.decoder()
    broken.norm.scale.set_value(jnp.full_like(broken.norm.scale.get_value(), jnp.nan))
    with pytest.raises(NumericalError, match="logits hold NaN"):
        score(broken, tiny.tokens(1, 40)[0], 16)


def test_a_packed_decoder_scores_as_its_expanded_kernels_do():
    quantized, _ = jgptq.quantize(tiny.decoder(dtype=jnp.float32), tiny.tokens(), group_size=32)
    expanded = copy_module(quantized)
    for block in expanded.layers:
        for linear in block.linears().values():
            linear.kernel.set_value(linear.kernel.get_value().dequantize())
    stream = tiny.tokens(1, 200, seed=5)[0]
    assert jgptq.perplexity(quantized, stream, 16) == pytest.approx(jgptq.perplexity(expanded, stream, 16), rel=1e-6)


@pytest.mark.skipif(not DATA.exists(), reason=f"needs {DATA}")
def test_a_trained_model_has_its_known_perplexity():
    assert jgptq.perplexity(load_hf(DATA), np.load(DATA / "eval_ids.npy"), 256) == pytest.approx(6.61, abs=0.005)


@pytest.mark.skipif(not DATA.exists(), reason=f"needs {DATA}")
@pytest.mark.filterwarnings("ignore:vLLM refuses")
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_on_a_trained_model_gptq_lies_between_float_and_rtn(bits: int):
    params, held_out = load_hf(DATA), np.load(DATA / "eval_ids.npy")
    calib = jgptq.calibration_tokens(DATA / "calib_ids.npy", samples=128, seq_len=256)
    rtn, _ = jgptq.quantize(params, method="rtn", bits=bits, group_size=32)
    gptq, report = jgptq.quantize(params, calib, bits=bits, group_size=32)
    values = [jgptq.perplexity(model, held_out, 256) for model in (params, gptq, rtn)]
    assert values[0] < values[1] < values[2]
    assert (values[1] - values[0]) < 0.75 * (values[2] - values[0])
    assert {row.name.split(".", 2)[2] for row in report.kept_float} == {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
