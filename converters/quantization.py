"""The `quantization_config` of GPTQ folders, and who can read what."""

import re
from collections.abc import Iterable
from typing import Any, Literal, cast, get_args

from jgptq.config import QuantizeConfig
from jgptq.errors import ConfigError

Format = Literal["gptq", "gptq_v2", "float"]
VERSION = "0.1.0"

VLLM_GROUPS = (-1, 32, 64, 128)
GPTQMODEL_GROUPS = (-1, 16, 32, 64, 128, 256, 512, 1024)
"""Group sizes that readers accept."""

_FUSED = {
    "self_attn.q_proj": "self_attn.qkv_proj",
    "self_attn.k_proj": "self_attn.qkv_proj",
    "self_attn.v_proj": "self_attn.qkv_proj",
    "mlp.gate_proj": "mlp.gate_up_proj",
    "mlp.up_proj": "mlp.gate_up_proj",
}
"""What readers that fuse linears call them: a rule that skips one must match the fused name as well."""


def check_format(file_format: str, config: QuantizeConfig) -> Format:
    """Returns the format of that name, unless it cannot hold the run's grid.

    Raises:
      ConfigError: an unknown format, or an asymmetric grid in GPTQ v1.
    """
    if file_format not in get_args(Format):
        raise ConfigError(f"format must be one of {', '.join(get_args(Format))}, found {file_format!r}")
    if file_format == "gptq" and not config.sym:
        message = "format 'gptq' (v1) stores zero - 1, so it cannot hold the zero points of asymmetric grids"
        raise ConfigError(f"{message}; use 'gptq_v2' (--format gptq_v2)")
    return cast(Format, file_format)


def quantization_config(config: QuantizeConfig, file_format: str, kept_float: Iterable[str], blocks: int) -> dict[str, Any]:
    """The `quantization_config` object, as GPTQModel, transformers and vLLM read it.

    Args:
      config: the run's settings.
      file_format: "gptq" or "gptq_v2".
      kept_float: paths in the decoder (`layers.0.mlp.up_proj`) of linears that are not packed.
      blocks: how many blocks the decoder has.
    """
    result: dict[str, Any] = {
        "quant_method": "gptq",
        "method": "gptq",
        "bits": config.bits,
        "group_size": config.group_size,
        "desc_act": False,
        "sym": config.sym,
        "lm_head": False,
        "checkpoint_format": file_format,
        "format": file_format,
        "pack_dtype": "int32",
        "meta": {
            "quantizer": [f"jgptq:{VERSION}"],
            "damp_percent": config.damping,
            "method": config.method,
            "order": config.order,
            "static_groups": False,
            "true_sequential": True,
        },
    }
    if rules := skip_rules(kept_float, blocks):
        result["dynamic"] = rules
    return result


def skip_rules(kept_float: Iterable[str], blocks: int) -> dict[str, dict[str, Any]]:
    """Rules `-:regex` that make readers leave these linears float: one for each kind of linear."""
    where: dict[str, set[int]] = {}
    for path in kept_float:
        _, index, kind = path.split(".", 2)
        where.setdefault(kind, set()).add(int(index))
    rules: dict[str, dict[str, Any]] = {}
    for kind, indices in where.items():
        names = "|".join(re.escape(name) for name in dict.fromkeys((kind, _FUSED.get(kind, kind))))
        which = r"\d+" if len(indices) == blocks else f"(?:{'|'.join(map(str, sorted(indices)))})"
        rules[rf"-:^model\.layers\.{which}\.(?:{names})$"] = {}
    return rules


def reader_warnings(config: QuantizeConfig, file_format: str) -> list[str]:
    """Sentences on who will refuse the files; empty where vLLM, GPTQModel and transformers all load them."""
    if file_format == "float":
        return []
    found = []
    if not config.sym:
        found.append("vLLM refuses asymmetric GPTQ files; GPTQModel loads them (as v2)")
    if config.bits in (2, 3):
        found.append(f"vLLM refuses {config.bits}-bit GPTQ files; GPTQModel loads them")
    if config.group_size not in VLLM_GROUPS:
        found.append(f"vLLM serves groups of {VLLM_GROUPS}, not {config.group_size}")
    if config.group_size not in GPTQMODEL_GROUPS:
        found.append(f"GPTQModel loads groups of {GPTQMODEL_GROUPS}, not {config.group_size}, and transformers loads through it")
    return found
