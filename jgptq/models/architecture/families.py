"""Architectures as a table: a row holds all that is special to a family, and nothing else does.

A row says which keys of a `config.json` set the decoder's switches, which switches all models of the family share, and what the
modules are called in a checkpoint. A new architecture whose computation the switches of `ModelConfig` describe is one more row.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jgptq.errors import ArchitectureError

REQUIRED = object()
"""The default of a key that every file has to have."""


@dataclasses.dataclass(frozen=True)
class Key:
    """Where a switch of `ModelConfig` stands in a `config.json`."""

    name: str
    default: Any = REQUIRED  # what the file says where it is silent
    values: Mapping[Any, Any] = dataclasses.field(default_factory=dict)  # what the file says -> the switch, where they differ

    def read(self, stored: Any) -> Any:
        """The switch that the file's value stands for."""
        return self.values.get(stored, stored)

    def stored(self, switch: Any) -> Any:
        """The file's value that stands for a switch; the last one where there are several."""
        return next((stored for stored, read in reversed(list(self.values.items())) if read == switch), switch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
    """How a `config.json` limits attention to a sliding window.

    The blocks that it limits are one of

        all          every block
        opt_in       where `use_sliding_window` is true, those of `layer_types`, or else those from `max_window_layers` on
        alternating  those of `layer_types`, or else every other block, beginning with the first
    """

    default: int  # the width where the file is silent
    blocks: str = "opt_in"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture."""

    hf_class: str  # transformers' class, for `architectures`
    keys: Mapping[str, Key]  # switch of `ModelConfig` -> where it stands in the file
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # switches that all models of the family share
    positions: str = "rotary"  # rotary or learned
    max_positions: int = 2048  # of `max_position_embeddings`, where the file is silent
    position_offset: int = 0  # of learned positions: the row of the table that belongs to position 0
    partial_rotary: float | None = None  # part of a head that is rotated, where the file is silent; None: all of it, always
    window: Window | None = None  # None: attention sees all positions
    decoder: str = "model"  # what stands before the names of all modules but the output projection
    modules: Mapping[str, str] = dataclasses.field(default_factory=dict)  # path in a block, or top-level name -> name in the file


_SIZES = {
    name: Key(name) for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
}
_COMMON = _SIZES | {
    "num_key_value_heads": Key("num_key_value_heads", None),  # None: as many as query heads
    "head_dim": Key("head_dim", None),  # None: hidden_size / num_attention_heads
    "hidden_act": Key("hidden_act", "silu"),
    "norm_eps": Key("rms_norm_eps", 1e-6),
    "tie_word_embeddings": Key("tie_word_embeddings", False),
}
_ATTENTION_BIAS = {"qkv_bias": Key("attention_bias", False), "o_bias": Key("attention_bias", False)}
_TANH = "gelu_pytorch_tanh"
_LLAMA_NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}

FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        hf_class="LlamaForCausalLM",
        keys=_COMMON | _ATTENTION_BIAS | {"mlp_bias": Key("mlp_bias", False)},
        modules=_LLAMA_NORMS,
    ),
    "mistral": Family(
        hf_class="MistralForCausalLM",
        keys=_COMMON | {"num_key_value_heads": Key("num_key_value_heads", 8)},
        max_positions=131072,
        window=Window(default=4096, blocks="all"),
        modules=_LLAMA_NORMS,
    ),
    "qwen2": Family(
        hf_class="Qwen2ForCausalLM",
        keys=_COMMON | {"num_key_value_heads": Key("num_key_value_heads", 32)},
        fixed={"qkv_bias": True},
        max_positions=32768,
        window=Window(default=4096),
        modules=_LLAMA_NORMS,
    ),
    "qwen3": Family(
        hf_class="Qwen3ForCausalLM",
        keys=_COMMON
        | _ATTENTION_BIAS
        | {"num_key_value_heads": Key("num_key_value_heads", 32), "head_dim": Key("head_dim", 128)},
        fixed={"qk_norm": "head"},
        max_positions=32768,
        window=Window(default=4096),
        modules=_LLAMA_NORMS,
    ),
    # arXiv 2205.01068. The 350m model norms the stream after each sublayer, and its token vectors are narrower than the stream.
    "opt": Family(
        hf_class="OPTForCausalLM",
        keys=_SIZES
        | {
            "intermediate_size": Key("ffn_dim"),
            "hidden_act": Key("activation_function", "relu"),
            "block_form": Key("do_layer_norm_before", True, {True: "pre", False: "post"}),
            "final_norm": Key("_remove_final_layer_norm", False, {False: True, True: False}),
            "embedding_width": Key("word_embed_proj_dim", None),
            "norm_affine": Key("layer_norm_elementwise_affine", True),
            "qkv_bias": Key("enable_bias", True),
            "o_bias": Key("enable_bias", True),
            "mlp_bias": Key("enable_bias", True),
            "tie_word_embeddings": Key("tie_word_embeddings", True),
        },
        fixed={"norm": "layer", "norm_eps": 1e-5, "norm_bias": True, "gated_mlp": False},
        positions="learned",
        position_offset=2,
        decoder="model.decoder",
        modules={
            "attn_norm": "self_attn_layer_norm",
            "mlp_norm": "final_layer_norm",
            "self_attn.o_proj": "self_attn.out_proj",
            "mlp.up_proj": "fc1",
            "mlp.down_proj": "fc2",
            "norm": "final_layer_norm",
        },
    ),
    "stablelm": Family(
        hf_class="StableLmForCausalLM",
        keys=_SIZES
        | {
            "num_key_value_heads": Key("num_key_value_heads", 32),
            "hidden_act": Key("hidden_act", "silu"),
            "norm_eps": Key("layer_norm_eps", 1e-5),
            "block_form": Key("use_parallel_residual", False, {False: "pre", True: "parallel"}),
            "qkv_bias": Key("use_qkv_bias", False),
            "tie_word_embeddings": Key("tie_word_embeddings", False),
        },
        fixed={"norm": "layer", "norm_bias": True},
        max_positions=4096,
        partial_rotary=0.25,
        modules=_LLAMA_NORMS,
    ),
    "gemma": Family(
        hf_class="GemmaForCausalLM",
        keys=_COMMON
        | _ATTENTION_BIAS
        | {
            "num_key_value_heads": Key("num_key_value_heads", 16),
            "head_dim": Key("head_dim", 256),
            # The first files say "gelu" and mean its approximation.
            "hidden_act": Key("hidden_act", _TANH, {"gelu": _TANH, _TANH: _TANH}),
            "tie_word_embeddings": Key("tie_word_embeddings", True),
        },
        fixed={"norm_offset": 1.0, "embedding_scaled": True},
        max_positions=8192,
        modules=_LLAMA_NORMS,
    ),
    # arXiv 2408.00118.
    "gemma2": Family(
        hf_class="Gemma2ForCausalLM",
        keys=_COMMON
        | _ATTENTION_BIAS
        | {
            "num_key_value_heads": Key("num_key_value_heads", 4),
            "head_dim": Key("head_dim", 256),
            "hidden_act": Key("hidden_activation", _TANH),
            "query_pre_attn_scalar": Key("query_pre_attn_scalar", 256),
            "attn_logit_softcapping": Key("attn_logit_softcapping", 50.0),
            "final_logit_softcapping": Key("final_logit_softcapping", 30.0),
            "tie_word_embeddings": Key("tie_word_embeddings", True),
        },
        fixed={"block_form": "sandwich", "norm_offset": 1.0, "embedding_scaled": True},
        max_positions=8192,
        window=Window(default=4096, blocks="alternating"),
        modules={
            "attn_norm": "input_layernorm",
            "attn_out_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_out_norm": "post_feedforward_layernorm",
        },
    ),
    "olmo2": Family(
        hf_class="Olmo2ForCausalLM",
        keys=_COMMON | _ATTENTION_BIAS | {"norm_eps": Key("rms_norm_eps", 1e-5)},
        fixed={"block_form": "output", "qk_norm": "width"},
        modules={"attn_norm": "post_attention_layernorm", "mlp_norm": "post_feedforward_layernorm"},
    ),
}

SWITCHES: Mapping[str, tuple[Any, ...]] = {
    "alibi": (False,),
    "attention_multiplier": (1.0,),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "embedding_multiplier": (1.0,),
    "final_logit_softcapping": (),
    "logit_scale": (1.0,),
    "logits_scaling": (1.0,),
    "lm_head_multiplier": (1.0,),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "parallel_attn": (False,),
    "qk_layernorm": (False,),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1.0,),
    "rotary_pct": (1.0,),
    "use_bidirectional_attention": (False,),
    "use_parallel_residual": (False,),
    "use_qkv_bias": (False,),
}
"""Keys by which configs of other architectures change the computation, with values that change nothing (as null does). Where a
row does not read such a key, another value is refused by name."""


def family_of(model_type: str) -> Family:
    """The row of an architecture.

    Raises:
      ArchitectureError: there is none; the message lists those known.
    """
    if model_type not in FAMILIES:
        raise ArchitectureError(f"config.json: architecture {model_type!r} is not known; known are {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def checkpoint_name(path: str, model_type: str) -> str:
    """The name in a checkpoint of the module at a path in the decoder; rules, reports and files speak of modules by it.

    Args:
      path: dotted, such as `layers.0.mlp.up_proj`, `norm` or `lm_head`.
      model_type: the architecture.

    Returns:
      The name, such as `model.layers.0.mlp.up_proj`, or `model.decoder.layers.0.fc1` in an OPT.

    Raises:
      ArchitectureError: an unknown architecture.
    """
    family = family_of(model_type)
    if path == "lm_head":
        return path
    if path.startswith("layers."):
        _, index, within = path.split(".", 2)
        return f"{family.decoder}.layers.{index}.{family.modules.get(within, within)}"
    return f"{family.decoder}.{family.modules.get(path, path)}"
