"""Presets: settings that go together, so that nobody has to read a table to choose them."""

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
"""What each preset sets beside the defaults. All give plain files that cost nothing more when served; they differ in time."""


def make_config(settings: Mapping[str, Any]) -> QuantizeConfig:
    """The config that keyword settings describe: those of `preset`, where one is named, under all that are given beside it.

    Args:
      settings: fields of `QuantizeConfig`, of which rules may have the form of a `dynamic` dict; and optionally `preset`: "fast",
        "balanced" (the defaults) or "best".

    Raises:
      ConfigError: an unknown name (those known are listed), or a value out of range.
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
