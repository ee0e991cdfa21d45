"""The OLMo families: no norm weights at first, then norms on the output of each sublayer."""

from collections.abc import Mapping

from jgptq.models.architecture.row import Family, Key, Window
from jgptq.models.architecture.rows.common import ATTENTION_BIAS, COMMON, LLAMA_NORMS, OUTPUT_NORMS

ROWS: Mapping[str, Family] = {
    # arXiv 2402.00838.
    "olmo": Family(
        hf_class="OlmoForCausalLM",
        keys={name: key for name, key in COMMON.items() if name != "norm_eps"}
        | ATTENTION_BIAS
        | {"clip_qkv": Key("clip_qkv", None)},
        fixed={"norm": "layer", "norm_affine": False, "norm_eps": 1e-5},
        modules=LLAMA_NORMS,
    ),
    "olmo2": Family(
        hf_class="Olmo2ForCausalLM",
        keys=COMMON | ATTENTION_BIAS | {"norm_eps": Key("rms_norm_eps", 1e-5)},
        fixed={"block_form": "output", "qk_norm": "width"},
        modules=OUTPUT_NORMS,
    ),
    # What extends the context speaks of the blocks without a window; one base wavelength is for all.
    "olmo3": Family(
        hf_class="Olmo3ForCausalLM",
        keys=COMMON | ATTENTION_BIAS | {"norm_eps": Key("rms_norm_eps", 1e-5)},
        fixed={"block_form": "output", "qk_norm": "width"},
        rotary_defaults={"rope_theta": 500000.0},
        rotated="sliding",
        local_theta=Key("rope_theta", 500000.0),
        window=Window(default=4096, blocks="patterned", period=4),
        modules=OUTPUT_NORMS,
    ),
}
