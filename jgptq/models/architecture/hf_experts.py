"""The part of a Hugging Face `config.json` that describes a mixture of experts <-> `ExpertsConfig`."""

import reprlib
from collections.abc import Mapping
from typing import Any

from jgptq.errors import ArchitectureError, CheckpointError
from jgptq.models.architecture.experts import ExpertsConfig
from jgptq.models.architecture.row import SPARSE_BLOCKS, Family, Mixture


def experts_from_hf(hf: Mapping[str, Any], family: Family) -> ExpertsConfig | None:
    """The switches of a mixture of experts; None for a dense family.

    Args:
      hf: the parsed file, in which no required key is missing.
      family: the architecture.

    Raises:
      ArchitectureError: an unknown way to choose experts.
      CheckpointError: a token goes to more experts than there are, or than the groups have that it may choose from.
    """
    mixture = family.experts
    if mixture is None:
        return None
    fields = {switch: key.read(key.given(hf)) for switch, key in mixture.keys.items()} | dict(mixture.fixed)
    if "shared_experts" in fields:
        fields["shared_width"] = (fields.pop("shared_experts") or 0) * fields["width"]
    for switch in ("groups", "kept_groups"):
        fields[switch] = fields.get(switch) or 1
    grouped = fields.pop("grouped", True)
    if not isinstance(grouped, bool):
        name, known = mixture.keys["grouped"].name, ", ".join(mixture.keys["grouped"].values)
        raise ArchitectureError(f"config.json: {name} {reprlib.repr(grouped)} is not known; known are {known}")
    if not grouped:
        fields["groups"] = fields["kept_groups"] = 1
    config = ExpertsConfig(**fields, sparse_layers=sparse_layers(hf, mixture))
    _check(config)
    return config


def _check(config: ExpertsConfig) -> None:
    """Refuses numbers that are allowed one by one and leave too few experts to choose from.

    Raises:
      CheckpointError: as said.
    """
    experts, groups, kept = config.num_experts, config.groups, config.kept_groups
    if config.experts_per_token > experts:
        raise CheckpointError(
            f"config.json: a token cannot go to {config.experts_per_token} of {experts} experts; fetch the file again"
        )
    each = experts // groups
    too_small = groups > 1 and each < config.group_best
    if experts % groups or too_small or kept > groups or config.experts_per_token > kept * each:
        raise CheckpointError(
            f"config.json: a token cannot go to {config.experts_per_token} of {experts} experts in {kept} of {groups} groups; "
            "fetch the file again"
        )


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
    said = {name: default if hf.get(name) is None else hf[name] for name, default in SPARSE_BLOCKS[mixture.blocks].items()}
    if mixture.blocks == "all":
        return (True,) * layers
    if mixture.blocks == "after_first":
        first = said["first_k_dense_replace"]
        return tuple(index >= (mixture.first_dense if first is None else first) for index in range(layers))
    dense = said["mlp_only_layers"] or ()
    return tuple(index not in dense and (index + 1) % said["decoder_sparse_step"] == 0 for index in range(layers))
