"""Architecture switches of the decoder; field names equal the keys of a Hugging Face config where there is one."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jgptq.errors import ArchitectureError, CheckpointError
from jgptq.models.rotary import RopeConfig

ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder of the Llama family."""

    model_type: str = "llama"  # llama, mistral, qwen2 or qwen3
    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # width of the gated MLP
    num_hidden_layers: int  # L
    num_attention_heads: int  # H
    num_key_value_heads: int  # J; J < H is grouped-query attention
    head_dim: int  # F
    hidden_act: str = "silu"  # activation of the gate
    rms_norm_eps: float = 1e-6  # added to the mean square
    rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)  # rotary embedding
    tie_word_embeddings: bool = False  # the output projection is the embedding
    qkv_bias: bool = False  # biases on q, k, v
    o_bias: bool = False  # bias on the attention's output projection
    mlp_bias: bool = False  # biases on gate, up, down
    qk_norm: bool = False  # RMS norm on each head's queries and keys
    layer_windows: tuple[int | None, ...]  # per block: positions that attention sees, None for all
    dtype: str = "float32"  # what activations are computed in: float32 or bfloat16

    @property
    def compute_dtype(self) -> jnp.dtype:
        """`dtype` as jax's own."""
        return jnp.dtype(self.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Family:
    """Where an architecture departs from Llama."""

    qkv_bias: bool | None = None  # None: read `attention_bias`
    o_bias: bool | None = None  # None: read `attention_bias`
    qk_norm: bool = False
    default_window: int | None = None  # the class default where `sliding_window` is not in the file
    opt_in_window: bool = True  # a window counts only where the config says `use_sliding_window`
    mlp_bias: bool = False  # whether `mlp_bias` is read
    default_positions: int = 2048  # the class default where `max_position_embeddings` is not in the file


FAMILIES = {
    "llama": _Family(mlp_bias=True),
    "mistral": _Family(qkv_bias=False, o_bias=False, default_window=4096, opt_in_window=False, default_positions=131072),
    "qwen2": _Family(qkv_bias=True, o_bias=False, default_window=4096, default_positions=32768),
    "qwen3": _Family(qk_norm=True, default_window=4096, default_positions=32768),
}


def config_from_hf(hf: Mapping[str, Any], dtype: str = "auto") -> ModelConfig:
    """Reads a Hugging Face `config.json`.

    Args:
      hf: the parsed file.
      dtype: "float32", "bfloat16", or "auto": bfloat16 where the checkpoint is bfloat16, else float32 (float16 computes in
        float32, which holds its values exactly).

    Returns:
      The decoder's switches.

    Raises:
      ArchitectureError: an unknown architecture or activation; the message lists those known.
      CheckpointError: a key is missing.
    """
    model_type = hf.get("model_type")
    if model_type not in FAMILIES:
        raise ArchitectureError(f"config.json: architecture {model_type!r} is not known; known are {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    missing = [key for key in needed if hf.get(key) is None]
    if missing:
        raise CheckpointError(f"config.json: {', '.join(missing)} missing; is this the config of a {model_type} model?")
    heads = hf["num_attention_heads"]
    # Qwen3 fixes head_dim at 128 where its config is silent; the others derive it.
    derived = 128 if model_type == "qwen3" else hf["hidden_size"] // heads
    head_dim = hf.get("head_dim") or derived
    kv_default = {"mistral": 8, "qwen2": 32, "qwen3": 32}.get(model_type, heads)
    kv_heads = hf.get("num_key_value_heads", kv_default)
    kv_heads = heads if kv_heads is None else kv_heads
    if heads % kv_heads:
        raise CheckpointError(f"config.json: {heads} attention heads cannot share {kv_heads} key-value heads")
    hidden_act = hf.get("hidden_act", "silu")
    if hidden_act not in ACTIVATIONS:
        raise ArchitectureError(f"config.json: hidden_act {hidden_act!r} is not known; known are {', '.join(ACTIVATIONS)}")
    attention_bias = bool(hf.get("attention_bias", False))
    return ModelConfig(
        model_type=model_type,
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_hidden_layers=hf["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        hidden_act=hidden_act,
        rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope=RopeConfig.from_hf({"max_position_embeddings": family.default_positions, **hf}, head_dim),
        tie_word_embeddings=hf.get("tie_word_embeddings", False),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        o_bias=attention_bias if family.o_bias is None else family.o_bias,
        mlp_bias=family.mlp_bias and bool(hf.get("mlp_bias", False)),
        qk_norm=family.qk_norm,
        layer_windows=_layer_windows(hf, family),
        dtype=_resolve_dtype(hf, dtype),
    )


def config_to_hf(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """The `config.json` of a decoder that did not come from a file; `config_from_hf` reads it back.

    Args:
      config: the decoder's switches.
      dtype: dtype of the stored tensors, for `torch_dtype`.
    """
    classes = {
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
    }
    fields = dataclasses.asdict(config)
    windows = {window for window in fields.pop("layer_windows") if window is not None}
    for derived in ("rope", "qkv_bias", "o_bias", "qk_norm", "dtype"):
        fields.pop(derived)
    if config.model_type != "llama":
        fields.pop("mlp_bias")
        fields["sliding_window"] = max(windows, default=None)
    if FAMILIES[config.model_type].opt_in_window and config.model_type != "llama":
        fields["use_sliding_window"] = bool(windows)
        fields["max_window_layers"] = sum(window is None for window in config.layer_windows)
        fields["layer_types"] = ["full_attention" if window is None else "sliding_attention" for window in config.layer_windows]
    if FAMILIES[config.model_type].qkv_bias is None:
        fields["attention_bias"] = config.qkv_bias
    rope = {"rope_parameters": config.rope.to_hf(), "rope_theta": config.rope.rope_theta}
    limits = {"max_position_embeddings": config.rope.max_position_embeddings}
    return {"architectures": [classes[config.model_type]], **fields, **rope, **limits, "torch_dtype": dtype}


def _layer_windows(hf: Mapping[str, Any], family: _Family) -> tuple[int | None, ...]:
    """The attention window of each block, by the rules of each architecture's own config."""
    layers = hf["num_hidden_layers"]
    window = hf.get("sliding_window", family.default_window)
    if family.default_window is None or window is None:
        return (None,) * layers
    if not family.opt_in_window:
        return (window,) * layers
    if not hf.get("use_sliding_window", False):
        return (None,) * layers
    types = hf.get("layer_types")
    if types is None:
        first = hf.get("max_window_layers", 28)
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    unknown = sorted(set(types) - {"sliding_attention", "full_attention"})
    if unknown or len(types) != layers:
        raise ArchitectureError(f"config.json: layer_types must be {layers} of full_attention, sliding_attention; found {types}")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _resolve_dtype(hf: Mapping[str, Any], dtype: str) -> str:
    """The compute dtype; "auto" is resolved here and nowhere else."""
    if dtype == "auto":
        return "bfloat16" if (hf.get("dtype") or hf.get("torch_dtype")) == "bfloat16" else "float32"
    if dtype not in DTYPES:
        raise ArchitectureError(f"dtype {dtype!r} is not known; known are auto, {', '.join(DTYPES)}")
    return dtype
