"""What the formats share: a run's settings in the `meta` of a config, and regexes that say which linears have which settings."""

import re
import reprlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from jgptq.errors import CheckpointError, ConfigError
from jgptq.models import ModelConfig, checkpoint_name
from jgptq.models.mixture.stages import EXPERTS, sparse_stages
from jgptq.models.stages import block_stages
from jgptq.settings.options import SAME_AS_HERE, options
from jgptq.settings.rules import rules_from_dynamic, rules_to_dynamic
from jgptq.settings.run import QuantizeConfig
from jgptq.settings.solver import SolverConfig

VERSION = "0.1.0"
HEAD = "lm_head"

PUBLISHED: Mapping[str, Any] = MappingProxyType(
    {name: known.published for name, known in options(QuantizeConfig).items() if known.published is not SAME_AS_HERE}
)
"""Settings of a run that no reader needs, kept in `meta`; a folder of another program is taken to have those of plain GPTQ."""

MOST_REPEATS = 4
"""Repeats (`*`, `+`, `{}`) that a pattern of a file's rules may have."""

Key = TypeVar("Key", bound=Hashable)


def meta_of(config: QuantizeConfig) -> dict[str, Any]:
    """The settings of a run that no reader needs."""
    return {
        "quantizer": [f"jgptq:{VERSION}"],
        "damp_percent": config.damping,
        **{name: getattr(config, name) for name in PUBLISHED},
        "static_groups": config.order == "static",
        "true_sequential": True,
        "rules": rules_to_dynamic(config.rules),
    }


def recorded(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of a `QuantizeConfig` that `meta_of` recorded, rules excepted; what is missing is that of plain GPTQ."""
    damping = meta.get("damp_percent") or QuantizeConfig.damping
    return {"damping": damping, **{name: meta.get(name, value) for name, value in PUBLISHED.items()}}


def own_settings(config: QuantizeConfig) -> dict[str, Any]:
    """What `settings_from` needs besides `meta_of`, for formats whose config does not state it elsewhere."""
    return {"bits": config.bits, "group_size": config.group_size, "sym": config.sym, "lm_head": config.lm_head}


def settings_from(meta: Mapping[str, Any]) -> QuantizeConfig:
    """The settings that `meta_of` and `own_settings` recorded.

    Raises:
      CheckpointError: a setting that is missing or not allowed.
    """
    try:
        own = {name: meta[name] for name in ("bits", "group_size", "sym", "lm_head")}
        return QuantizeConfig(**own, **recorded(meta), rules=rules_from_dynamic(meta["rules"]))
    except KeyError as error:
        raise CheckpointError(f"config.json: quantization_config.meta has no {error}; fetch the file again") from None
    except ConfigError as error:
        raise CheckpointError(f"config.json: quantization_config cannot be read: {error}") from None


def check_patterns(patterns: Iterable[str], key: str) -> None:
    """Refuses a file's regexes that may take longer than anyone waits: a match tries every way to share a name among the repeats.

    Args:
      patterns: the regexes.
      key: where in `quantization_config` they stand.

    Raises:
      CheckpointError: names the first one.
    """
    for pattern in patterns:
        if len(re.findall(r"(?<!\\)[*+{]", pattern)) > MOST_REPEATS or re.search(r"(?<!\\)\)[*+{]", pattern):
            advice = f"expected patterns of at most {MOST_REPEATS} repeats, none of a group"
            raise CheckpointError(f"config.json: quantization_config.{key}: {advice}, found {reprlib.repr(pattern)}")


def used_settings(config: QuantizeConfig) -> list[SolverConfig]:
    """The settings that linears of a run may have: its own, then those of its rules."""
    return [config.with_rule(None), *(config.with_rule(rule) for rule in config.rules if not rule.skip)]


def patterns(
    linears: Mapping[str, SolverConfig | None], model: ModelConfig, key: Callable[[str, SolverConfig | None], Key]
) -> Iterator[tuple[str, Key]]:
    """Regexes for the full names of all linears of blocks, each with the key of the linears that it matches.

    One regex for each kind of linear and key. No name is matched by two of them, as long as fused linears agree.

    Args:
      linears: the settings of each linear by its path in the decoder, None where it is float.
      model: the decoder's switches.
      key: what linears of one regex have in common, from path and settings.
    """
    where: dict[tuple[str, Key], dict[int, None]] = {}
    for path, settings in linears.items():
        if path != HEAD:
            _, index, kind = path.split(".", 2)
            where.setdefault((_of_any_expert(kind), key(path, settings)), {})[int(index)] = None
    stages = block_stages(model) if model.experts is None else (*block_stages(model), *sparse_stages(model))
    fused = {path: fusion.name for stage in stages for fusion in stage.fusions for path in fusion.linears}
    experts = [_of_any_expert(f"mlp.experts.0.{path.rpartition('.')[2]}") for path in EXPERTS]
    for (kind, common), indices in where.items():
        # Readers that fuse linears ask for the fused name: a regex must match that as well.
        one = kind in experts and all(where.get((other, common)) == indices for other in experts)
        before, names = _stored_names(dict.fromkeys((kind, "mlp.experts" if one else fused.get(kind, kind))), model)
        which = r"\d+" if len(indices) == model.num_hidden_layers else f"(?:{'|'.join(map(str, sorted(indices)))})"
        yield rf"^{before}\.{which}\.(?:{names})$", common


def _stored_names(kinds: Iterable[str], model: ModelConfig) -> tuple[str, str]:
    """What names in the checkpoint begin with up to the number of the block, and the alternatives after it, as regexes."""
    names = [checkpoint_name(f"layers.0.{kind}", model.model_type).partition(".0.") for kind in kinds]
    return re.escape(names[0][0]), "|".join(re.escape(within).replace(rf"\.{_ANY}\.", r"\.\d+\.") for _, _, within in names)


_ANY = "1000000"
"""In a path, the number of any expert."""


def _of_any_expert(kind: str) -> str:
    """The path within a block of a linear; of the same linear of all experts, which have the same settings, one."""
    return re.sub(r"^mlp\.experts\.\d+\.", f"mlp.experts.{_ANY}.", kind)
