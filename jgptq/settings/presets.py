"""Presets: named sets of options, from the fastest to the most accurate."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from jgptq.errors import ConfigError
from jgptq.settings.rules import rules_from_dynamic
from jgptq.settings.run import QuantizeConfig

Preset = Literal["fast", "balanced", "best"]

PRESETS: Mapping[Preset, Mapping[str, Any]] = MappingProxyType(
    {
        "fast": MappingProxyType({"target_shift": 0.0, "residual_shift": 0.0}),
        "balanced": MappingProxyType({}),
        "best": MappingProxyType({"refine": 3, "tune": 0.75}),
    }
)
"""The options that each preset sets to another value than the default. They differ in time and loss; the files of all cost the
same to serve."""


def make_config(settings: Mapping[str, Any]) -> QuantizeConfig:
    """The config of a run from keyword settings; an explicit option replaces the preset's value.

    Args:
      settings: fields of `QuantizeConfig`, and optionally `preset`: "fast", "balanced" (the defaults) or "best". Rules may have
        the form of a `dynamic` dict, see `jgptq.settings.rules`.

    Returns:
      The config.

    Raises:
      ConfigError: an unknown name (the message lists the known ones), or a value that is not allowed.

    Example:
      >>> config = make_config({"preset": "best", "bits": 3, "rules": {"-:lm_head": {}}})
      >>> config.refine, config.bits, config.rules
      (3, 3, (Rule(pattern='lm_head', skip=True, settings=()),))
      >>> make_config({"preset": "best", "refine": 1}).refine
      1
    """
    known = [field.name for field in dataclasses.fields(QuantizeConfig)]
    given = dict(settings)
    preset = given.pop("preset", "balanced")
    if preset not in PRESETS:
        raise ConfigError(f"preset must be one of {tuple(PRESETS)}, found {preset!r}")
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ConfigError(f"unknown settings {', '.join(unknown)}; known are preset, {', '.join(known)}")
    rules = given.get("rules") or ()
    rules = rules_from_dynamic(rules) if isinstance(rules, Mapping) else rules
    given["rules"] = tuple(rules) if isinstance(rules, list) else rules
    return QuantizeConfig(**{**PRESETS[preset], **given})
