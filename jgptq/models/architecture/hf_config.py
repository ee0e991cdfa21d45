"""A Hugging Face `config.json` <-> the decoder's switches, by the rows of `jgptq.models.architecture.families`."""

from collections.abc import Mapping
from typing import Any

from jgptq.errors import ArchitectureError, CheckpointError
from jgptq.models.architecture.config import ACTIVATIONS, DTYPES, LearnedPositions, ModelConfig, Positions
from jgptq.models.architecture.families import SWITCHES, family_of
from jgptq.models.architecture.hf_experts import experts_from_hf, experts_to_hf, mixture_keys, with_known_names
from jgptq.models.architecture.latent import LatentConfig
from jgptq.models.architecture.row import REQUIRED, Family, Window
from jgptq.models.rotary import RopeConfig


def config_from_hf(hf: Mapping[str, Any], dtype: str = "auto") -> ModelConfig:
    """Reads a Hugging Face `config.json`.

    Args:
      hf: the parsed file.
      dtype: "float32", "bfloat16", or "auto": bfloat16 where the checkpoint is bfloat16, else float32 (float16 computes in
        float32, which holds its values exactly).

    Returns:
      The decoder's switches.

    Raises:
      ArchitectureError: an unknown architecture or activation (the message lists those known), or a switch that is not
        implemented.
      CheckpointError: a key is missing, or contradicts others.
    """
    model_type = str(hf.get("model_type"))
    family = family_of(model_type)
    hf = with_known_names(hf, family)
    keys = (*family.keys.values(), *mixture_keys(family), *(family.latent or {}).values())
    missing = [key.name for key in keys if key.default is REQUIRED and hf.get(key.name) is None]
    if missing:
        raise CheckpointError(f"config.json: {', '.join(missing)} missing; is this the config of a {model_type} model?")
    _refuse_switches(hf, family)
    fields = {switch: key.read(hf.get(key.name, key.default)) for switch, key in family.keys.items()} | dict(family.fixed)
    heads, width = fields["num_attention_heads"], fields["hidden_size"]
    if family.latent is not None:  # every head has keys and values of its own, whatever the file says
        fields["num_key_value_heads"] = heads
    fields["num_key_value_heads"] = kv_heads = (
        heads if fields.get("num_key_value_heads") is None else fields["num_key_value_heads"]
    )
    fields["head_dim"] = fields.get("head_dim") or width // heads
    if heads % kv_heads:
        raise CheckpointError(f"config.json: {heads} attention heads cannot share {kv_heads} key-value heads")
    if fields["hidden_act"] not in ACTIVATIONS:
        name, known = family.keys["hidden_act"].name, ", ".join(ACTIVATIONS)
        raise ArchitectureError(f"config.json: {name} {fields['hidden_act']!r} is not known; known are {known}")
    if fields.get("embedding_width") == width:
        fields["embedding_width"] = None
    return ModelConfig(
        model_type=model_type,
        **fields,
        positions=_positions(hf, family, fields["head_dim"]),
        experts=experts_from_hf(hf, family),
        latent=_latent(hf, family),
        layer_windows=_layer_windows(hf, family.window),
        dtype=_resolve_dtype(hf, dtype),
    )


def config_to_hf(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """The `config.json` of a decoder that did not come from a file; `config_from_hf` reads it back.

    Args:
      config: the decoder's switches.
      dtype: dtype of the stored tensors, for `torch_dtype`.
    """
    family = family_of(config.model_type)
    hf: dict[str, Any] = {"architectures": [family.hf_class], "model_type": config.model_type}
    hf |= {key.name: key.stored(getattr(config, switch)) for switch, key in family.keys.items()}
    if config.embedding_width is None and "embedding_width" in family.keys:
        hf[family.keys["embedding_width"].name] = config.hidden_size
    hf |= experts_to_hf(config.experts, family)
    hf |= {key.name: key.stored(getattr(config.latent, switch)) for switch, key in (family.latent or {}).items()}
    if family.window is not None:
        hf |= _windows_to_hf(config.layer_windows, family.window)
    hf["max_position_embeddings"] = config.positions.max_position_embeddings
    if isinstance(config.positions, RopeConfig):
        hf |= {"rope_parameters": config.positions.to_hf(), "rope_theta": config.positions.rope_theta}
    return hf | {"torch_dtype": dtype}


def _latent(hf: Mapping[str, Any], family: Family) -> LatentConfig | None:
    """The switches of latent attention."""
    if family.latent is None:
        return None
    return LatentConfig(**{switch: key.read(hf.get(key.name, key.default)) for switch, key in family.latent.items()})


def _refuse_switches(hf: Mapping[str, Any], family: Family) -> None:
    """Raises an error that names every key which asks for a computation that the row does not describe."""
    read = {key.name for key in (*family.keys.values(), *mixture_keys(family))}
    wrong = [
        f"expected {name} {' or '.join(map(repr, values)) or 'null'}, found {hf[name]!r}"
        for name, values in SWITCHES.items()
        if name not in read and hf.get(name) is not None and hf[name] not in values
    ]
    if wrong:
        raise ArchitectureError(f"config.json: not implemented for architecture {hf['model_type']!r}: {'; '.join(wrong)}")


def _positions(hf: Mapping[str, Any], family: Family, head_dim: int) -> Positions:
    """How positions reach the attention."""
    if family.positions == "learned":
        most = hf.get("max_position_embeddings", family.max_positions)
        return LearnedPositions(max_position_embeddings=most, offset=family.position_offset)
    silent = {"max_position_embeddings": family.max_positions, "rope_theta": family.rope_theta}
    return RopeConfig.from_hf({**silent, **hf}, head_dim, family.partial_rotary)


def _layer_windows(hf: Mapping[str, Any], known: Window | None) -> tuple[int | None, ...]:
    """The attention window of each block, by the rules of each architecture's own config."""
    layers = hf["num_hidden_layers"]
    window = None if known is None else hf.get("sliding_window", known.default)
    if known is None or window is None:
        return (None,) * layers
    if known.blocks == "all":
        return (window,) * layers
    if known.blocks.startswith("opt_in") and not hf.get("use_sliding_window", False):
        return (None,) * layers
    if known.blocks == "opt_in_all":
        return (window,) * layers
    types = hf.get("layer_types")
    if types is None:
        bound = hf.get("max_window_layers", 28)
        choose = {
            "alternating": lambda i: i % 2 == 0,
            "opt_in": lambda i: i >= bound,
            "opt_in_even": lambda i: i % 2 == 0 and i < bound,
        }[known.blocks]
        slides = [choose(i) for i in range(layers)]
        types = ["sliding_attention" if here else "full_attention" for here in slides]
    unknown = sorted(set(types) - {"sliding_attention", "full_attention"})
    if unknown or len(types) != layers:
        raise ArchitectureError(f"config.json: layer_types must be {layers} of full_attention, sliding_attention; found {types}")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _windows_to_hf(windows: tuple[int | None, ...], known: Window) -> dict[str, Any]:
    """The keys that `_layer_windows` reads."""
    width = max((window for window in windows if window is not None), default=None)
    if known.blocks == "all":
        return {"sliding_window": width}
    if known.blocks == "opt_in_all":
        return {"sliding_window": width, "use_sliding_window": width is not None}
    types = ["full_attention" if window is None else "sliding_attention" for window in windows]
    if known.blocks == "alternating":
        return {"sliding_window": width, "layer_types": types}
    return {
        "sliding_window": width,
        "use_sliding_window": width is not None,
        "max_window_layers": sum(window is None for window in windows),
        "layer_types": types,
    }


def _resolve_dtype(hf: Mapping[str, Any], dtype: str) -> str:
    """The compute dtype; "auto" is resolved here and nowhere else."""
    if dtype == "auto":
        return "bfloat16" if (hf.get("dtype") or hf.get("torch_dtype")) == "bfloat16" else "float32"
    if dtype not in DTYPES:
        raise ArchitectureError(f"dtype {dtype!r} is not known; known are auto, {', '.join(DTYPES)}")
    return dtype
