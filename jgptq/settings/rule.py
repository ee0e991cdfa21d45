"""A rule: changed settings for the linears whose name a regex matches."""

import dataclasses
import re
from typing import Any

from jgptq.errors import ConfigError
from jgptq.settings.solver import RULE_OPTIONS, SolverConfig


@dataclasses.dataclass(frozen=True, init=False)
class Rule:
    """Changes the settings of the linears whose full name a regex matches, or skips them; see `jgptq.settings.rules`.

    Args:
      pattern: a regex, tried with `re.match` on names such as `model.layers.0.mlp.down_proj`.
      skip: whether the linears stay float.
      **overrides: options of `SolverConfig` that a rule can set (`RULE_OPTIONS`); None keeps the run's value.

    Raises:
      ConfigError: the pattern is no regex, an option is unknown or has the wrong type, or the rule both skips and sets options.

    Example:
      >>> rules = (Rule(pattern=r".*down_proj", bits=8), Rule(pattern=r"model\\.layers\\.0\\.", skip=True))
      >>> config = QuantizeConfig(bits=4, rules=rules)
    """

    pattern: str
    skip: bool
    settings: tuple[tuple[str, Any], ...]  # the options that the rule changes, in the order of `RULE_OPTIONS`

    def __init__(self, *, pattern: str, skip: bool = False, **overrides: Any):
        if unknown := [name for name in overrides if name not in RULE_OPTIONS]:
            raise ConfigError(
                f"rule {pattern!r}: {', '.join(unknown)} cannot be set by a rule; known are {', '.join(RULE_OPTIONS)}"
            )
        settings = tuple((name, overrides[name]) for name in RULE_OPTIONS if overrides.get(name) is not None)
        for name, value in (("pattern", pattern), ("skip", skip), ("settings", settings)):
            object.__setattr__(self, name, value)
        self._check_pattern()
        self._check_settings()

    @property
    def overrides(self) -> dict[str, Any]:
        """The options that this rule changes."""
        return dict(self.settings)

    def _check_pattern(self) -> None:
        if not isinstance(self.pattern, str) or self.pattern.startswith(("+:", "-:")):
            advice = "the prefixes +: and -: belong to the dynamic form; here, say skip=True or skip=False"
            raise ConfigError(f"the pattern of a rule must be a regex, found {self.pattern!r}; {advice}")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(f"the pattern of a rule must be a regex, found {self.pattern!r}: {error}") from None

    def __repr__(self) -> str:
        settings = "".join(f", {name}={value!r}" for name, value in self.settings)
        return f"Rule(pattern={self.pattern!r}, skip={self.skip!r}{settings})"

    def _check_settings(self) -> None:
        defaults = {field.name: field.default for field in dataclasses.fields(SolverConfig)}
        types = {"skip": bool} | {name: type(defaults[name]) for name in RULE_OPTIONS}
        wrong = [
            f"{name} must be {types[name].__name__}, found {value!r}"
            for name, value in {"skip": self.skip, **self.overrides}.items()
            if type(value) is not types[name]
        ]
        if self.skip is True and self.settings:
            wrong.append(f"it skips, so it cannot set {', '.join(self.overrides)}")
        if wrong:
            raise ConfigError(f"rule {self.pattern!r}: {'; '.join(wrong)}")
