"""The Cohere families: one layer norm for attention and MLP, which are parallel, and rotated pairs of neighbours."""

from collections.abc import Mapping

from jgptq.models.architecture.row import Family, Key, Window
from jgptq.models.architecture.rows.common import ATTENTION_BIAS, COMMON, LAYER_NORM_EPS

_KEYS = (
    COMMON
    | ATTENTION_BIAS
    | LAYER_NORM_EPS
    | {"tie_word_embeddings": Key("tie_word_embeddings", True), "logit_scale": Key("logit_scale", 0.0625)}
)
_FIXED = {"norm": "layer", "block_form": "parallel", "rotary_pairs": "neighbours"}

ROWS: Mapping[str, Family] = {
    "cohere": Family(
        hf_class="CohereForCausalLM",
        keys=_KEYS | {"qk_norm": Key("use_qk_norm", False, {False: None, True: "heads"})},
        fixed=_FIXED,
        max_positions=8192,
        rotary_defaults={"rope_theta": 500000.0},
        modules={"attn_norm": "input_layernorm"},
    ),
    # Blocks without a window have no positions at all.
    "cohere2": Family(
        hf_class="Cohere2ForCausalLM",
        keys={name: key for name, key in _KEYS.items() if name != "head_dim"},
        fixed=_FIXED,
        max_positions=8192,
        rotated="sliding",
        window=Window(default=4096, blocks="patterned", period=4, period_key="sliding_window_pattern"),
        modules={"attn_norm": "input_layernorm"},
    ),
}
