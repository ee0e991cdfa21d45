"""The settings of a whole run: those of the solver, and what the driver reads."""

import dataclasses

from jgptq.errors import ConfigError
from jgptq.settings.options import option, problems
from jgptq.settings.rule import Rule
from jgptq.settings.solver import SolverConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeConfig(SolverConfig):
    """How the linears of a decoder are quantized; `solver` are the settings that programs are compiled for.

    Raises:
      ConfigError: a value is not allowed; the message says which are.
    """

    tune: float = option(
        0.0,
        help="Passes over the calibration tokens of gradient descent on scales and norms, against the float model's predictions.",
        least=0,
        published=0.0,
    )
    allow_rtn_fallback: bool = option(
        False, help="Round a linear that cannot be solved to nearest and report it, instead of stopping."
    )
    lm_head: bool = option(False, help="Quantize the output projection as well.")
    rules: tuple[Rule, ...] = ()  # settings of single linears: the first rule that matches a name holds for it

    def __post_init__(self) -> None:
        if wrong := problems(self) + self._rule_problems():
            raise ConfigError("; ".join(wrong))

    def with_rule(self, rule: Rule | None) -> SolverConfig:
        """The solver's settings for linears that a rule holds for."""
        return dataclasses.replace(self.solver, **({} if rule is None else rule.overrides))

    def _rule_problems(self) -> list[str]:
        if not isinstance(self.rules, tuple) or not all(isinstance(rule, Rule) for rule in self.rules):
            return [f"rules must be a tuple of Rule, found {self.rules!r}; rules_from_dynamic makes one of a dict"]
        found = []
        patterns = [rule.pattern for rule in self.rules]
        if twice := {pattern for pattern in patterns if patterns.count(pattern) > 1}:
            found.append(f"rules: the first match wins, so only one can have the pattern {', '.join(map(repr, sorted(twice)))}")
        if problems(self):
            return found
        for rule in self.rules:
            try:
                self.with_rule(rule)
            except ConfigError as error:
                found.append(f"rule {rule.pattern!r}: {error}")
        return found
