"""A Hugging Face `config.json` <-> the decoder's switches, by the rows of `jgptq.models.architecture.families`."""

import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

from jgptq.errors import ArchitectureError, CheckpointError
from jgptq.models.architecture.config import ACTIVATIONS, DTYPES, ModelConfig
from jgptq.models.architecture.families import SWITCHES, family_of, file_type, row_of
from jgptq.models.architecture.hf_experts import experts_from_hf, experts_to_hf
from jgptq.models.architecture.latent import LatentConfig
from jgptq.models.architecture.per_layer import positions_to_hf, read_positions, read_ropes, read_windows, windows_to_hf
from jgptq.models.architecture.row import REQUIRED, Family
from jgptq.models.architecture.typed import BLOCK_KINDS, KEYS, QUANTIZATION, ROPE, problems, read_keys, refuse


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
      CheckpointError: values that are missing, of a wrong type or out of range, all at once; or values that contradict others.
    """
    row = row_of(hf)
    family = family_of(row)
    refuse(_value_problems(hf, family))
    given = {switch: key.given(hf) for switch, key in family.keys.items()}
    _refuse_switches(hf, family)
    fields = {switch: key.read(given[switch]) for switch, key in family.keys.items()} | dict(family.fixed)
    heads, width = fields["num_attention_heads"], fields["hidden_size"]
    if family.latent is not None:  # every head has keys and values of its own, whatever the file says
        fields["num_key_value_heads"] = heads
    if family.latent is not None:  # every head has keys and values of its own, whatever the file says
        fields["num_key_value_heads"] = heads
    fields["num_key_value_heads"] = kv_heads = (
        heads if fields.get("num_key_value_heads") is None else fields["num_key_value_heads"]
    )
    fields["head_dim"] = fields.get("head_dim") or width // heads
    fields["intermediate_size"] = fields.get("intermediate_size") or 4 * width
    if fields["head_dim"] == 0:
        raise CheckpointError(f"config.json: hidden_size {width} cannot be divided into {heads} attention heads")
    if heads % kv_heads:
        raise CheckpointError(f"config.json: {heads} attention heads cannot share {kv_heads} key-value heads")
    if fields["hidden_act"] not in ACTIVATIONS:
        name, known = family.keys["hidden_act"].name, ", ".join(ACTIVATIONS)
        found = reprlib.repr(fields["hidden_act"])
        raise ArchitectureError(f"config.json: {name} {found} is not known; known are {known}")
    if fields.get("embedding_width") == width:
        fields["embedding_width"] = None
    windows = read_windows(hf, family.window, fields["num_hidden_layers"])
    positions = read_positions(hf, family, fields["head_dim"])
    return ModelConfig(
        model_type=row,
        **fields,
        positions=positions,
        layer_ropes=read_ropes(hf, family, positions, windows, fields["head_dim"]),
        layer_windows=windows,
        experts=experts_from_hf(hf, family),
        latent=_latent(hf, family),
        dtype=_resolve_dtype(hf, dtype),
    )


def config_to_hf(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """The `config.json` of a decoder that did not come from a file; `config_from_hf` reads it back.

    Args:
      config: the decoder's switches.
      dtype: dtype of the stored tensors, for `torch_dtype`.
    """
    family = family_of(config.model_type)
    hf: dict[str, Any] = {"architectures": [family.hf_class], "model_type": file_type(config.model_type)}
    hf |= {key: values[0] for key, values in family.where.items()}
    hf |= {key.name: key.stored(getattr(config, switch)) for switch, key in family.keys.items()}
    if config.embedding_width is None and "embedding_width" in family.keys:
        hf[family.keys["embedding_width"].name] = config.hidden_size
    hf |= experts_to_hf(config.experts, family)
    hf |= {key.name: key.stored(getattr(config.latent, switch)) for switch, key in (family.latent or {}).items()}
    hf |= windows_to_hf(config.layer_windows, family.window) | positions_to_hf(config, family)
    return hf | {"torch_dtype": dtype}


def _latent(hf: Mapping[str, Any], family: Family) -> LatentConfig | None:
    """The switches of latent attention."""
    if family.latent is None:
        return None
    return LatentConfig(**{switch: key.read(key.given(hf)) for switch, key in family.latent.items()})


def _value_problems(hf: Mapping[str, Any], family: Family) -> Iterator[str]:
    """A sentence for every value that is missing, of a wrong type or out of range."""
    required = [key for key in family.all_keys if key.default is REQUIRED]
    missing = {key.name: key for key in required if key.given(hf) in (None, REQUIRED)}
    if missing:
        yield f"{', '.join(missing)} missing; is this the config of a {hf['model_type']} model?"
    silent = {name for key in missing.values() for name in (key.name, *key.aliases)}
    yield from problems(hf, KEYS, sorted(read_keys(family) - silent))
    for name, kinds in (("rope_parameters", ROPE), ("rope_scaling", ROPE), ("quantization_config", QUANTIZATION)):
        within = hf.get(name)
        if isinstance(within, Mapping):
            yield from problems(within, kinds, kinds, name)
            for kind in BLOCK_KINDS:  # Gemma 3 and others have rotary settings of each kind of block
                if isinstance(within.get(kind), Mapping):
                    yield from problems(within[kind], kinds, kinds, f"{name}.{kind}")


def _refuse_switches(hf: Mapping[str, Any], family: Family) -> None:
    """Raises an error that names every key which asks for a computation that the row does not describe."""
    wrong = [
        f"expected {name} {' or '.join(map(repr, values)) or 'null'}, found {reprlib.repr(hf[name])}"
        for name, values in SWITCHES.items()
        if name not in family.names and hf.get(name) is not None and hf[name] not in values
    ]
    if wrong:
        raise ArchitectureError(f"config.json: not implemented for architecture {hf['model_type']!r}: {'; '.join(wrong)}")


def _resolve_dtype(hf: Mapping[str, Any], dtype: str) -> str:
    """The compute dtype; "auto" is resolved here and nowhere else."""
    if dtype == "auto":
        return "bfloat16" if (hf.get("dtype") or hf.get("torch_dtype")) == "bfloat16" else "float32"
    if dtype not in DTYPES:
        raise ArchitectureError(f"dtype {dtype!r} is not known; known are auto, {', '.join(DTYPES)}")
    return dtype
