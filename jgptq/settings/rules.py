"""Rules: settings of single linears by ordered regexes, in the form of GPTQModel's `dynamic`.

The full name of a linear, such as `model.layers.0.mlp.down_proj` or `lm_head`, is matched against the rules in order with
`re.match`. The first rule that matches applies; where none matches, the run's own settings do.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jgptq.errors import ConfigError
from jgptq.settings.rule import Rule
from jgptq.settings.run import QuantizeConfig
from jgptq.settings.solver import RULE_OPTIONS, STORED_OPTIONS, SolverConfig


def first_match(rules: Iterable[Rule], name: str) -> Rule | None:
    """The rule that applies to a linear, or None."""
    return next((rule for rule in rules if re.match(rule.pattern, name)), None)


def resolve(config: QuantizeConfig, name: str) -> SolverConfig | None:
    """The settings of one linear.

    Args:
      config: the run's settings.
      name: the linear's full name in the checkpoint, such as `model.layers.0.mlp.down_proj` or `lm_head`.

    Returns:
      The solver's settings for it, or None where a rule skips the linear.
    """
    rule = first_match(config.rules, name)
    return None if rule is not None and rule.skip else config.with_rule(rule)


def rules_from_dynamic(dynamic: Mapping[str, Mapping[str, Any]]) -> tuple[Rule, ...]:
    """The rules of a `dynamic` dict, in its order.

    Args:
      dynamic: `{"-:regex": {}}` skips, `{"+:regex": {"bits": 8}}` or `{"regex": {"bits": 8}}` overrides.

    Returns:
      One rule for each entry.

    Raises:
      ConfigError: an entry that is no dict, an unknown key (the message lists the known ones), or what `Rule` refuses.
    """
    if not isinstance(dynamic, Mapping):
        raise ConfigError(f'rules must be a dict such as {{"+:regex": {{"bits": 8}}}}, found {dynamic!r}')
    rules = []
    for key, overrides in dynamic.items():
        if not isinstance(key, str):
            raise ConfigError(f'the key of a rule must be "+:regex" or "-:regex", found {key!r}')
        if not isinstance(overrides, Mapping):
            raise ConfigError(f'rule {key!r} must be a dict such as {{"bits": 8}}, or {{}} to skip, found {overrides!r}')
        if unknown := [name for name in overrides if name not in RULE_OPTIONS]:
            raise ConfigError(
                f"rule {key!r} has unknown keys {', '.join(map(str, unknown))}; known are {', '.join(RULE_OPTIONS)}"
            )
        if empty := [name for name, value in overrides.items() if value is None]:
            raise ConfigError(f"rule {key!r} sets {', '.join(empty)} to nothing; leave out what the rule does not change")
        skip, pattern = _split(key)
        rules.append(Rule(pattern=pattern, skip=skip, **overrides))
    return tuple(rules)


def rules_to_dynamic(rules: Iterable[Rule]) -> dict[str, dict[str, Any]]:
    """The `dynamic` dict of rules; the inverse of `rules_from_dynamic`."""
    return {f"{'-' if rule.skip else '+'}:{rule.pattern}": rule.overrides for rule in rules}


def rules_from_file(path: str | Path) -> tuple[Rule, ...]:
    """The rules of a JSON file that holds a `dynamic` dict.

    Raises:
      ConfigError: no such file, no JSON, a key that occurs twice, or what `rules_from_dynamic` refuses.
    """

    def once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise ConfigError(f"{path}: {', '.join(map(repr, sorted(twice)))} occurs twice; remove one")
        return dict(pairs)

    try:
        dynamic = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=once)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; expected a JSON file of rules") from None
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f'{path} is not JSON: {error}; expected rules such as {{"-:regex": {{}}, "+:regex": {{"bits": 8}}}}'
        ) from None
    try:
        return rules_from_dynamic(dynamic)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def stored_rules(dynamic: object) -> tuple[Rule, ...]:
    """The rules of a checkpoint's `dynamic`, reduced to the options that its tensors depend on.

    Of rules with the same pattern only the first can apply, and only that one is kept.

    Raises:
      ConfigError: not a dict of dicts, or a pattern that is no regex.
    """
    if not dynamic:
        return ()
    if not isinstance(dynamic, Mapping) or not all(
        isinstance(key, str) and isinstance(overrides, Mapping) for key, overrides in dynamic.items()
    ):
        raise ConfigError(f"dynamic must be a dict of dicts, found {dynamic!r}")
    known: dict[str, Rule] = {}
    for key, overrides in dynamic.items():
        skip, pattern = _split(key)
        kept = {name: overrides[name] for name in STORED_OPTIONS if not skip and overrides.get(name) is not None}
        known.setdefault(pattern, Rule(pattern=pattern, skip=skip, **kept))
    return tuple(known.values())


def without_effect(config: QuantizeConfig, names: Sequence[str]) -> list[str]:
    """A sentence for each rule that applies to no linear: why, and the nearest names.

    Args:
      config: the run's settings.
      names: the full names of all linears that could be quantized.
    """
    applied = {rule.pattern for name in names if (rule := first_match(config.rules, name)) is not None}
    sentences = []
    for rule in config.rules:
        if rule.pattern in applied:
            continue
        if any(re.match(rule.pattern, name) for name in names):
            sentences.append(
                f"rule {rule.pattern!r} has no effect: rules before it match all that it matches, and the first match wins"
            )
        else:
            advice = (
                " lm_head is quantized on request only: pass lm_head=True (--lm-head)."
                if re.match(rule.pattern, "lm_head")
                else ""
            )
            nearest = ", ".join(nearest_names(rule.pattern, names))
            sentences.append(f"rule {rule.pattern!r} matches no linear of this model; the nearest names are {nearest}.{advice}")
    return sentences


def nearest_names(pattern: str, names: Sequence[str], count: int = 3) -> list[str]:
    """The names most similar to the letters of a regex, best first; of the same linear in all blocks, only one."""
    letters = re.sub(r"\\[dwsDWSbB]|[\\^$()\[\]{}|?*+]", "", pattern)

    def similarity(name: str) -> float:
        return difflib.SequenceMatcher(None, letters, name, autojunk=False).ratio()

    kinds: dict[str, str] = {}
    for name in sorted(names, key=similarity, reverse=True):
        kinds.setdefault(re.sub(r"\d+", "", name), name)
    return list(kinds.values())[:count]


def _split(key: str) -> tuple[bool, str]:
    """Whether a key of a `dynamic` dict skips the linears, and its regex."""
    return key.startswith("-:"), key[2:] if key.startswith(("+:", "-:")) else key
