"""A decoder in the runtime layout computes what the one that it was made from does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import jgptq
from converters import save_hf
from jgptq.errors import ConfigError
from jgptq.packed import PackedTensor, RuntimeTensor

_logits = jax.jit(lambda model, tokens: model(tokens))


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "rtn", "bits": 8, "sym": False, "group_size": -1},
        {"preset": "fast", "bits": 4, "order": "desc_act", "group_size": 32, "rules": {r"+:.*o_proj": {"bits": 3}}},
    ],
)
@pytest.mark.filterwarnings("ignore:vLLM refuses")
def test_logits_stay_and_files_are_refused(settings, tmp_path):
    calib = tiny.tokens()
    quantized, _ = jgptq.quantize(tiny.decoder(), calib, **settings)
    served = jgptq.for_serving(quantized)
    tokens = jnp.asarray(calib[:2])
    np.testing.assert_allclose(_logits(served, tokens), _logits(quantized, tokens), atol=1e-4)
    for block in served.layers:
        for stage in block.stages():
            for name, linear in zip(stage.names, stage.linears, strict=True):
                kernel = linear.kernel.get_value()
                three = "rules" in settings and name.endswith("o_proj")
                assert isinstance(kernel, PackedTensor if three else RuntimeTensor), name
    original = quantized.layers[0].self_attn.q_proj.kernel.get_value()
    assert isinstance(original, PackedTensor)
    converted = served.layers[0].self_attn.q_proj.kernel.get_value()
    np.testing.assert_array_equal(converted.dequantize(), original.dequantize())
    with pytest.raises(ConfigError, match="runtime layout, which files do not hold; save what `for_serving` was given"):
        save_hf(served, tmp_path / "out")


def test_a_float_decoder_has_nothing_to_convert():
    with pytest.raises(ConfigError, match="is not quantized"):
        jgptq.for_serving(tiny.decoder())
