"""The settings of a whole run: those of the solver, and those that only the driver reads."""

import dataclasses

from jgptq.errors import ConfigError
from jgptq.settings.options import option, problems
from jgptq.settings.rule import Rule
from jgptq.settings.solver import SolverConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeConfig(SolverConfig):
    """How the linears of a decoder are quantized; `solver` is the part that a compiled program depends on.

    Raises:
      ConfigError: a value is not allowed; the message says which are.
    """

    tune: float = option(
        0.0,
        help="Passes over the calibration tokens in which scales and norms are trained (Adam) towards the float model's "
        "predictions, after the last block; 0 for none.",
        least=0,
        published=0.0,
    )
    allow_rtn_fallback: bool = option(
        False,
        help="Round a linear to nearest, and report it, where it cannot be solved (no calibration token reaches it, or its "
        "Hessian cannot be factored), instead of stopping with an error.",
    )
    lm_head: bool = option(
        False, help="Quantize the output projection (lm_head) as well, which must not be tied to the embedding."
    )
    rules: tuple[Rule, ...] = ()  # settings of single linears; for each, the first rule that matches its name applies

    def __post_init__(self) -> None:
        if wrong := problems(self) + self._rule_problems():
            raise ConfigError("; ".join(wrong))

    def with_rule(self, rule: Rule | None) -> SolverConfig:
        """The solver's settings for linears that a rule applies to."""
        return dataclasses.replace(self.solver, **({} if rule is None else rule.overrides))

    def _rule_problems(self) -> list[str]:
        if not isinstance(self.rules, tuple) or not all(isinstance(rule, Rule) for rule in self.rules):
            return [f"rules must be a tuple of Rule, found {self.rules!r}; rules_from_dynamic makes one of a dict"]
        messages = []
        patterns = [rule.pattern for rule in self.rules]
        if twice := {pattern for pattern in patterns if patterns.count(pattern) > 1}:
            messages.append(
                f"rules: the first match wins, so only one can have the pattern {', '.join(map(repr, sorted(twice)))}"
            )
        if problems(self):
            return messages
        for rule in self.rules:
            try:
                self.with_rule(rule)
            except ConfigError as error:
                messages.append(f"rule {rule.pattern!r}: {error}")
        return messages
