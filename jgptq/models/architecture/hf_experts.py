"""The part of a Hugging Face `config.json` that describes a mixture of experts <-> `ExpertsConfig`."""

from collections.abc import Iterable, Mapping
from typing import Any

from jgptq.errors import CheckpointError
from jgptq.models.architecture.experts import ExpertsConfig
from jgptq.models.architecture.row import Family, Key, Mixture

_BLOCKS: Mapping[str, Mapping[str, Any]] = {
    "all": {},
    "after_first": {"first_k_dense_replace": None},
    "stepped": {"decoder_sparse_step": 1, "mlp_only_layers": None},
}
"""Which blocks of a family are sparse -> the keys that say it, with what a silent file means."""


def mixture_keys(family: Family) -> Iterable[Key]:
    """The keys of a `config.json` that describe a mixture of experts; none for a dense family."""
    if family.experts is None:
        return ()
    return (*family.experts.keys.values(), *(Key(name, default) for name, default in _BLOCKS[family.experts.blocks].items()))


def with_known_names(hf: Mapping[str, Any], family: Family) -> Mapping[str, Any]:
    """The file with keys of another name under that by which they are read."""
    aliases = {} if family.experts is None else family.experts.aliases
    known = {aliases[name]: value for name, value in hf.items() if name in aliases}
    return {name: value for name, value in hf.items() if name not in aliases} | {**known, **{k: hf[k] for k in known if k in hf}}


def experts_from_hf(hf: Mapping[str, Any], family: Family) -> ExpertsConfig | None:
    """The switches of a mixture of experts; None for a dense family.

    Args:
      hf: the parsed file, in which no required key is missing.
      family: the architecture.

    Raises:
      CheckpointError: a token goes to more experts than there are.
    """
    mixture = family.experts
    if mixture is None:
        return None
    fields = {switch: key.read(hf.get(key.name, key.default)) for switch, key in mixture.keys.items()} | dict(mixture.fixed)
    if "shared_experts" in fields:
        fields["shared_width"] = (fields.pop("shared_experts") or 0) * fields["width"]
    for switch in ("groups", "kept_groups"):
        fields[switch] = fields.get(switch) or 1
    if fields.pop("grouped", True) is False:
        fields["groups"] = fields["kept_groups"] = 1
    config = ExpertsConfig(**fields, sparse_layers=sparse_layers(hf, mixture))
    if not 0 < config.experts_per_token <= config.num_experts:
        raise CheckpointError(
            f"config.json: a token cannot go to {config.experts_per_token} of {config.num_experts} experts; fetch the file again"
        )
    return config


def experts_to_hf(config: ExpertsConfig | None, family: Family) -> dict[str, Any]:
    """The keys that `experts_from_hf` reads."""
    if config is None or family.experts is None:
        return {}
    hf = {key.name: key.stored(getattr(config, switch)) for switch, key in family.experts.keys.items()}
    dense = [index for index, sparse in enumerate(config.sparse_layers) if not sparse]
    blocks: dict[str, dict[str, Any]] = {
        "all": {},
        "stepped": {"decoder_sparse_step": 1, "mlp_only_layers": dense},
        "after_first": {"first_k_dense_replace": len(dense)},
    }
    return hf | blocks[family.experts.blocks]


def sparse_layers(hf: Mapping[str, Any], mixture: Mixture) -> tuple[bool, ...]:
    """Which blocks have experts.

    Args:
      hf: the parsed file.
      mixture: its `blocks` are "all"; "stepped": those whose number, counted from one, is a multiple of `decoder_sparse_step`,
        without those of `mlp_only_layers`; or "after_first": those after the first `first_k_dense_replace`.
    """
    layers = hf["num_hidden_layers"]
    said = {name: default if hf.get(name) is None else hf[name] for name, default in _BLOCKS[mixture.blocks].items()}
    if mixture.blocks == "all":
        return (True,) * layers
    if mixture.blocks == "after_first":
        first = said["first_k_dense_replace"]
        return tuple(index >= (mixture.first_dense if first is None else first) for index in range(layers))
    dense = said["mlp_only_layers"] or ()
    return tuple(index not in dense and (index + 1) % said["decoder_sparse_step"] == 0 for index in range(layers))
