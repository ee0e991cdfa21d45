"""The `quantization_config` of GPTQ folders, and who can read what."""

import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal, cast, get_args

from jgptq.errors import CheckpointError, ConfigError
from jgptq.models import ModelConfig, checkpoint_name
from jgptq.models.mixture.stages import EXPERTS, sparse_stages
from jgptq.models.stages import block_stages
from jgptq.settings.options import SAME_AS_HERE, options
from jgptq.settings.rules import first_match, rules_from_dynamic, rules_to_dynamic, stored_rules
from jgptq.settings.run import QuantizeConfig
from jgptq.settings.solver import STORED_OPTIONS, SolverConfig

Format = Literal["gptq", "gptq_v2", "float"]
VERSION = "0.1.0"

VLLM_GROUPS = (-1, 32, 64, 128)
GPTQMODEL_GROUPS = (-1, 16, 32, 64, 128, 256, 512, 1024)
"""Group sizes that readers accept."""

HEAD = "lm_head"

_PUBLISHED: Mapping[str, Any] = MappingProxyType(
    {name: known.published for name, known in options(QuantizeConfig).items() if known.published is not SAME_AS_HERE}
)
"""Settings of a run that no reader needs, kept in `meta`; a folder of another program is taken to have those of plain GPTQ."""


def check_format(file_format: str, config: QuantizeConfig) -> Format:
    """Returns the format of that name, unless it cannot hold the run's grid.

    Raises:
      ConfigError: an unknown format, or an asymmetric grid in GPTQ v1.
    """
    if file_format not in get_args(Format):
        raise ConfigError(f"format must be one of {', '.join(get_args(Format))}, found {file_format!r}")
    if file_format == "gptq" and not all(settings.sym for settings in _used_settings(config)):
        message = "format 'gptq' (v1) stores zero - 1, so it cannot hold the zero points of asymmetric grids"
        raise ConfigError(f"{message}; use 'gptq_v2' (--format gptq_v2)")
    return cast(Format, file_format)


def quantization_config(
    config: QuantizeConfig, file_format: str, linears: Mapping[str, SolverConfig | None], model: ModelConfig
) -> dict[str, Any]:
    """The `quantization_config` object, as GPTQModel, transformers and vLLM read it.

    `dynamic` says what each linear is, in rules of which one at most matches any name: GPTQModel puts rules that skip before all
    others, vLLM asks for the names of fused linears, and neither may change the meaning. The run's own rules stand in `meta`.

    Args:
      config: the run's settings.
      file_format: "gptq" or "gptq_v2".
      linears: the settings of each linear by its path in the decoder (`layers.0.mlp.up_proj`, `lm_head`), None where it is float.
      model: the decoder's switches: how many blocks it has, which linears readers fuse, and what they are called.
    """
    result: dict[str, Any] = {
        "quant_method": "gptq",
        "method": "gptq",
        "bits": config.bits,
        "group_size": config.group_size,
        "desc_act": False,
        "sym": config.sym,
        "lm_head": linears.get(HEAD) is not None,
        "checkpoint_format": file_format,
        "format": file_format,
        "pack_dtype": "int32",
        "meta": {
            "quantizer": [f"jgptq:{VERSION}"],
            "damp_percent": config.damping,
            **{name: getattr(config, name) for name in _PUBLISHED},
            "static_groups": config.order == "static",
            "true_sequential": True,
            "rules": rules_to_dynamic(config.rules),
        },
    }
    if dynamic := dynamic_rules(config, linears, model):
        result["dynamic"] = dynamic
    return result


def dynamic_rules(
    config: QuantizeConfig, linears: Mapping[str, SolverConfig | None], model: ModelConfig
) -> dict[str, dict[str, Any]]:
    """Rules that tell readers which linears are float, and which have other settings than the config's: one for each kind and
    settings. No name is matched by two of them, as long as fused linears agree."""
    base = _stored_settings(config)
    where: dict[tuple[str, tuple[tuple[str, Any], ...] | None], dict[int, None]] = {}
    rules: dict[str, dict[str, Any]] = {}
    for path, settings in linears.items():
        changes = None if settings is None else tuple(sorted(_stored_settings(settings).items() - base.items()))
        if changes == () or (path == HEAD and changes is None):  # a head is float unless it is declared
            continue
        if path == HEAD:
            rules["+:^lm_head$"] = dict(changes or ())
        else:
            _, index, kind = path.split(".", 2)
            where.setdefault((_same_of_all_experts(kind), changes), {})[int(index)] = None
    stages = block_stages(model) if model.experts is None else (*block_stages(model), *sparse_stages(model))
    fused = {path: fusion.name for stage in stages for fusion in stage.fusions for path in fusion.linears}
    experts = [_same_of_all_experts(f"mlp.experts.0.{path.rpartition('.')[2]}") for path in EXPERTS]
    for (kind, changes), indices in where.items():
        # Readers that fuse linears ask for the fused name: a rule that skips one must match that as well.
        one = kind in experts and all(where.get((other, changes)) == indices for other in experts)
        before, names = _stored_names(dict.fromkeys((kind, "mlp.experts" if one else fused.get(kind, kind))), model)
        which = r"\d+" if len(indices) == model.num_hidden_layers else f"(?:{'|'.join(map(str, sorted(indices)))})"
        rules[rf"{'-' if changes is None else '+'}:^{before}\.{which}\.(?:{names})$"] = dict(changes or ())
    return rules


def _stored_names(kinds: Iterable[str], model: ModelConfig) -> tuple[str, str]:
    """What names in the checkpoint begin with up to the number of the block, and the alternatives after it, as regexes."""
    names = [checkpoint_name(f"layers.0.{kind}", model.model_type).partition(".0.") for kind in kinds]
    return re.escape(names[0][0]), "|".join(re.escape(within).replace(rf"\.{_ANY}\.", r"\.\d+\.") for _, _, within in names)


_ANY = "1000000"
"""In a path, the number of any expert."""


def _same_of_all_experts(kind: str) -> str:
    """The path within a block of a linear; of the same linear of all experts, which have the same settings, one."""
    return re.sub(r"^mlp\.experts\.\d+\.", f"mlp.experts.{_ANY}.", kind)


def read_settings(quantization: Mapping[str, Any]) -> QuantizeConfig:
    """The settings that a GPTQ folder was written under, as far as its `quantization_config` records them.

    Raises:
      CheckpointError: rules that cannot be read.
    """
    meta = quantization.get("meta") or {}
    own = meta.get("rules")
    try:
        return QuantizeConfig(
            bits=quantization["bits"],
            group_size=quantization["group_size"],
            sym=quantization.get("sym", True),
            **{name: meta.get(name, value) for name, value in _PUBLISHED.items()},
            damping=meta.get("damp_percent") or QuantizeConfig.damping,
            rules=stored_rules(quantization.get("dynamic")) if own is None else rules_from_dynamic(own),
            lm_head=bool(quantization.get("lm_head", False)),
        )
    except ConfigError as error:
        raise CheckpointError(f"config.json: quantization_config cannot be read: {error}") from None


def declared_group_sizes(quantization: Mapping[str, Any]) -> Callable[[str], int]:
    """The group size that a checked `quantization_config` declares, as a function of the linear's name in the file.

    Raises:
      CheckpointError: rules that cannot be read.
    """
    try:
        rules = stored_rules(quantization.get("dynamic"))
    except ConfigError as error:
        raise CheckpointError(f"config.json: quantization_config cannot be read: {error}") from None

    def declared(name: str) -> int:
        rule = first_match(rules, name)
        return quantization["group_size"] if rule is None else rule.overrides.get("group_size", quantization["group_size"])

    return declared


def _stored_settings(config: SolverConfig) -> dict[str, Any]:
    """The settings that readers must know of."""
    return {name: getattr(config, name) for name in STORED_OPTIONS}


def _used_settings(config: QuantizeConfig) -> list[SolverConfig]:
    """The settings that linears of a run may have: its own, then those of its rules."""
    return [config.with_rule(None), *(config.with_rule(rule) for rule in config.rules if not rule.skip)]


def reader_warnings(config: QuantizeConfig, file_format: str) -> list[str]:
    """Sentences on who will refuse the files; empty where vLLM, GPTQModel and transformers all load them."""
    if file_format == "float":
        return []
    sentences = [sentence for settings in _used_settings(config) for sentence in _refusals(settings)]
    if config.rules or config.lm_head:
        sentences.append(
            "transformers reads no rules and no quantized lm_head (5.23 with optimum 2.3), and may load other weights without an "
            "error; GPTQModel and vLLM read both"
        )
    return list(dict.fromkeys(sentences))


def _refusals(config: SolverConfig) -> list[str]:
    """Sentences on who refuses linears of these settings."""
    sentences = []
    if not config.sym:
        sentences.append("vLLM refuses asymmetric GPTQ files; GPTQModel loads them (as v2)")
    if config.bits in (2, 3):
        sentences.append(f"vLLM refuses {config.bits}-bit GPTQ files; GPTQModel loads them")
    if config.group_size not in VLLM_GROUPS:
        sentences.append(f"vLLM serves groups of {VLLM_GROUPS}, not {config.group_size}")
    if config.group_size not in GPTQMODEL_GROUPS:
        sentences.append(
            f"GPTQModel loads groups of {GPTQMODEL_GROUPS}, not {config.group_size}, and transformers loads through it"
        )
    return sentences
