"""A decoder in the runtime layout computes what the one that it was made from does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import jgptq
from converters import save_hf
from jgptq.errors import ConfigError
from jgptq.models.packed import PackedTensor, RuntimeTensor

_logits = jax.jit(lambda model, tokens: model(tokens))


FORMS = [
    ({"qkv_bias": True}, ["mlp.gate_up_proj"]),
    (tiny.OPT_350M, ["mlp.up_proj"]),
    ({"block_form": "parallel", "norm": "layer"}, ["mlp.gate_up_proj"]),
    (tiny.GEMMA2, ["mlp.gate_up_proj"]),
    (tiny.GPTJ, ["mlp.up_proj"]),
    (tiny.NEOX, ["mlp.up_proj"]),
    (tiny.PHI3, ["mlp.gate_up_proj"]),
]


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "rtn", "bits": 8, "sym": False, "group_size": -1},
        {
            "preset": "fast",
            "bits": 4,
            "order": "desc_act",
            "group_size": 32,
            "rules": {r"+:.*((o|out)_proj|attention.dense)": {"bits": 3}},
        },
    ],
)
@pytest.mark.filterwarnings("ignore:vLLM refuses")
@pytest.mark.parametrize(("changes", "linears"), FORMS)
def test_logits_stay_and_files_are_refused(settings, changes, linears, tmp_path):
    calib = tiny.tokens()
    quantized, _ = jgptq.quantize(tiny.decoder(**changes), calib, **settings)
    served = jgptq.for_serving(quantized)
    tokens = jnp.asarray(calib[:2])
    np.testing.assert_allclose(_logits(served, tokens), _logits(quantized, tokens), atol=1e-4)
    for block, original in zip(served.layers, quantized.layers, strict=True):
        assert isinstance(block.self_attn.o_proj.kernel.get_value(), PackedTensor if "rules" in settings else RuntimeTensor)
        assert isinstance(block.mlp.down_proj.kernel.get_value(), RuntimeTensor)
        assert sorted(block.linears()) == sorted(["self_attn.qkv_proj", "self_attn.o_proj", "mlp.down_proj", *linears])
        for fusion in (fusion for stage in original.stages() for fusion in stage.fusions):
            kernels = [original.linears()[path].kernel.get_value() for path in fusion.linears]
            joined = jnp.concatenate([kernel.dequantize() for kernel in kernels], axis=1)
            np.testing.assert_array_equal(block.linears()[fusion.name].kernel.get_value().dequantize(), joined)
    assert not hasattr(served.layers[0].self_attn, "q_proj")
    with pytest.raises(ConfigError, match="runtime layout, which files do not hold; save what `for_serving` was given"):
        save_hf(served, tmp_path / "out")


@pytest.mark.filterwarnings("ignore:vLLM refuses")
def test_what_differs_stays_apart():
    """Files of others may hold q, k and v of their own order."""
    calib = tiny.tokens()
    quantized, _ = jgptq.quantize(tiny.decoder(), calib, preset="fast", bits=4, order="desc_act", group_size=32)
    k_proj = quantized.layers[0].self_attn.k_proj
    kernel = k_proj.kernel.get_value()
    k_proj.kernel.set_value(dataclasses.replace(kernel, group_index=jnp.roll(kernel.group_index, 1)))
    served = jgptq.for_serving(quantized)
    assert ["self_attn.q_proj" in block.linears() for block in served.layers] == [True] + [False] * (len(served.layers) - 1)
    tokens = jnp.asarray(calib[:2])
    np.testing.assert_allclose(_logits(served, tokens), _logits(quantized, tokens), atol=1e-4)


def test_a_float_decoder_has_nothing_to_convert():
    with pytest.raises(ConfigError, match="is not quantized"):
        jgptq.for_serving(tiny.decoder())
