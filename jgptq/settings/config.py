"""Settings of a quantization run: one frozen dataclass, checked when it is made."""

import dataclasses
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, get_args

from jgptq.errors import ConfigError

Method = Literal["gptq", "rtn", "gptaq", "qronos"]
Order = Literal["none", "group", "static", "desc_act"]
Scale = Literal["minmax", "mse", "hessian"]

BITS = (2, 3, 4, 8)
ROW_MULTIPLE = 32
"""K and N of a packed linear, and every group size, are multiples of this: 32 codes fill whole int32 words at any bit width."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """Settings of the linears whose full name a regex matches from its start; see `jgptq.settings.rules`.

    Raises:
      ConfigError: the pattern is no regex, a value has the wrong type, or the rule skips and sets something as well.
    """

    pattern: str  # tried with `re.match` on names such as model.layers.0.mlp.down_proj
    skip: bool = False  # the linears stay float
    bits: int | None = None  # this field and those below it: as in `QuantizeConfig`; None leaves the run's value
    group_size: int | None = None
    sym: bool | None = None
    order: str | None = None
    method: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str) or self.pattern.startswith(("+:", "-:")):
            advice = "the prefixes +: and -: belong to the dynamic form; here, say skip=True or skip=False"
            raise ConfigError(f"the pattern of a rule must be a regex, found {self.pattern!r}; {advice}")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(f"the pattern of a rule must be a regex, found {self.pattern!r}: {error}") from None
        types = {"skip": bool, "bits": int, "group_size": int, "sym": bool, "order": str, "method": str}
        values = {name: value for name in types if (value := getattr(self, name)) is not None}
        wrong = [
            f"{name} must be {types[name].__name__}, found {value!r}"
            for name, value in values.items()
            if type(value) is not types[name]
        ]
        if self.skip is True and self.overrides:
            wrong.append(f"it skips, so it cannot set {', '.join(self.overrides)}")
        if wrong:
            raise ConfigError(f"rule {self.pattern!r}: {'; '.join(wrong)}")

    @property
    def overrides(self) -> dict[str, Any]:
        """The settings that this rule changes."""
        return {name: value for name in OVERRIDES if (value := getattr(self, name)) is not None}


OVERRIDES = ("bits", "group_size", "sym", "order", "method")
"""What a rule can set."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """How the linears of a decoder are quantized.

    Raises:
      ConfigError: a value is out of range; the message lists those allowed.
    """

    bits: int = 4  # width of a code: 2, 3, 4 or 8
    group_size: int = 128  # rows of K that share a scale: a multiple of 32, or -1 for all of K
    sym: bool = True  # symmetric grid: the zero point is 2^(bits-1) everywhere and is not stored as data of its own
    method: Method = "gptq"  # "gptq"; "gptaq" and "qronos", its published asymmetric kin; "rtn", round-to-nearest
    order: Order = "group"  # of the rows: file order; by importance in and among groups; over all rows, groups kept; classic
    scale: Scale | None = None  # of a group: covers its rows; least |error|^2.4; least squared error weighted by diag H. None
    # is "hessian", and "minmax" for method "rtn"
    target_shift: float = 1.0  # fraction of what earlier layers lost in a linear's inputs that it makes up for; 0 to 1
    residual_shift: float = 1.0  # the same for what is lost in the residual stream that it adds to; method "gptq" alone
    refine: int = 0  # rounds of coordinate descent over the codes, alternating with re-fitted scales
    refit: bool = False  # re-fit scales and zero points once for the codes found; every round of `refine` does so anyway
    tune: float = 0.0  # passes over the tokens of gradient descent on scales and norms, against the float model's logits
    damping: float = 0.01  # added to the Hessian's diagonal, as a fraction of its mean
    float64: bool = False  # factor and solve in double precision
    allow_rtn_fallback: bool = False  # a linear that cannot be solved is rounded to nearest and reported, not an error
    rules: tuple[Rule, ...] = ()  # settings of single linears: the first rule that matches a name holds for it
    lm_head: bool = False  # the output projection is quantized as well

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be one of {allowed}, found {getattr(self, name)!r}"
            for name, allowed in _CHOICES.items()
            if getattr(self, name) not in allowed
        ]
        if self.group_size != -1 and (self.group_size <= 0 or self.group_size % ROW_MULTIPLE):
            problems.append(f"group_size must be -1 or a positive multiple of {ROW_MULTIPLE}, found {self.group_size}")
        if not 0.0 < self.damping <= 1.0:
            problems.append(f"damping must be in (0, 1], found {self.damping}; the usual value is 0.01")
        problems += [
            f"{name} must be in [0, 1], found {getattr(self, name)}"
            for name in ("target_shift", "residual_shift")
            if not 0.0 <= getattr(self, name) <= 1.0
        ]
        problems += [
            f"{name} must not be negative, found {getattr(self, name)}" for name in ("refine", "tune") if getattr(self, name) < 0
        ]
        if not isinstance(self.lm_head, bool):
            problems.append(f"lm_head must be true or false, found {self.lm_head!r}")
        problems += self._rule_problems()
        if problems:
            raise ConfigError("; ".join(problems))

    def with_rule(self, rule: Rule | None) -> "QuantizeConfig":
        """The settings of linears that a rule holds for; they have no rules of their own."""
        return dataclasses.replace(self, rules=(), lm_head=False, **({} if rule is None else rule.overrides))

    def _rule_problems(self) -> list[str]:
        if not isinstance(self.rules, tuple) or not all(isinstance(rule, Rule) for rule in self.rules):
            return [f"rules must be a tuple of Rule, found {self.rules!r}; rules_from_dynamic makes one of a dict"]
        problems = []
        patterns = [rule.pattern for rule in self.rules]
        if twice := {pattern for pattern in patterns if patterns.count(pattern) > 1}:
            problems.append(
                f"rules: the first match wins, so only one can have the pattern {', '.join(map(repr, sorted(twice)))}"
            )
        for rule in self.rules:
            try:
                self.with_rule(rule)
            except ConfigError as error:
                problems.append(f"rule {rule.pattern!r}: {error}")
        return problems

    @property
    def grid_search(self) -> Scale:
        """How scales are chosen."""
        if self.scale is not None:
            return self.scale
        return "minmax" if self.method == "rtn" else "hessian"

    @property
    def needs_tokens(self) -> bool:
        """Whether there is something that only calibration tokens can tell."""
        return self.method != "rtn" or self.grid_search == "hessian" or self.tune > 0

    @property
    def improves(self) -> bool:
        """Whether codes or scales are moved again after the loop."""
        return self.refit or self.refine > 0

    @property
    def asymmetric(self) -> bool:
        """Whether a solve looks at the float model's activations beside the quantized ones."""
        return self.method != "rtn" and (self.target_shift > 0 or self.shifts_residual)

    @property
    def shifts_residual(self) -> bool:
        """Whether linears that add to the residual stream make up for what it lost."""
        return self.method == "gptq" and self.residual_shift > 0


_CHOICES: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {"bits": BITS, "method": get_args(Method), "order": get_args(Order), "scale": (*get_args(Scale), None)}
)


def group_rows(k: int, group_size: int) -> int:
    """The number of rows in a group of a linear with `k` in-features: `group_size`, or `k` where it is -1."""
    return k if group_size == -1 else group_size


def fitting_group_sizes(k_sizes: list[int]) -> list[int]:
    """The group sizes that divide every K in `k_sizes`, -1 first, then the common ones up to 1024."""
    common = (32, 64, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024)
    return [-1, *(g for g in common if all(k % g == 0 for k in k_sizes))]


def packable(k: int, n: int) -> str | None:
    """None if a `[k, n]` linear can be held by the packed formats, else the reason, as a phrase."""
    bad = [f"{name}={size}" for name, size in (("K", k), ("N", n)) if size % ROW_MULTIPLE]
    return None if not bad else f"{' and '.join(bad)} {'is' if len(bad) == 1 else 'are'} not a multiple of {ROW_MULTIPLE}"
