"""What the compiled solver depends on: the grid, the method, the order and the damping."""

import dataclasses
from typing import Any, Literal, get_args

from jgptq.errors import ConfigError
from jgptq.settings.options import option, options, problems
from jgptq.settings.sizes import BITS, ROW_MULTIPLE

Method = Literal["gptq", "rtn", "gptaq", "qronos"]
Order = Literal["none", "group", "static", "desc_act"]
Scale = Literal["minmax", "mse", "hessian"]
StarvedExperts = Literal["shrink", "all_tokens", "rtn"]


def _check_group_size(value: Any) -> str | None:
    if isinstance(value, int) and (value == -1 or (value > 0 and value % ROW_MULTIPLE == 0)):
        return None
    return f"group_size must be -1 or a positive multiple of {ROW_MULTIPLE}, found {value!r}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SolverConfig:
    """How one linear is solved: the settings that a compiled program depends on.

    Raises:
      ConfigError: a value is not allowed; the message says which are.
    """

    bits: int = option(4, help="Bits of a quantized weight.", values=BITS, rule=True, stored=True)
    group_size: int = option(
        128,
        help="In-features of a linear that share a scale: a multiple of 32, or -1 for all of them.",
        check=_check_group_size,
        rule=True,
        stored=True,
    )
    sym: bool = option(
        True,
        help="Symmetric grid, which every reader loads; or asymmetric, with a zero point for each group.",
        rule=True,
        stored=True,
        flag="--sym/--asym",
    )
    method: Method = option(
        "gptq",
        help="gptq; gptaq and qronos, published variants of it that also read the float model's activations; rtn, round to "
        "nearest, without error compensation.",
        values=get_args(Method),
        rule=True,
        published="gptq",
    )
    order: Order = option(
        "group",
        help="Order in which the in-features of a linear are quantized: group, most important first (largest diagonal entry of "
        "the Hessian) inside each group and among groups; static, most important first over all, on scales chosen beforehand; "
        "none, as in the checkpoint; desc_act, as static but with groups formed in that order, the only one that needs g_idx in "
        "the files and a permutation when served.",
        values=get_args(Order),
        rule=True,
        published="none",
    )
    scale: Scale | None = option(
        None,
        help="How a group's scale is chosen: minmax, so that the grid covers all weights; mse, for the least sum of |error|^2.4; "
        "hessian, for the least squared error weighted by the Hessian's diagonal. By default hessian, and minmax for method rtn.",
        values=(*get_args(Scale), None),
        published=None,
    )
    target_shift: float = option(
        1.0,
        help="Which outputs a linear is fitted to: 1, those of the float model; 0, those of its float weights on the inputs that "
        "the quantized layers before it produce; in between, a mixture.",
        least=0,
        most=1,
        published=0.0,
    )
    residual_shift: float = option(
        1.0,
        help="Fraction of the error in the residual stream that a linear which adds to the stream is fitted to cancel; method "
        "gptq only.",
        least=0,
        most=1,
        published=0.0,
    )
    refine: int = option(
        0,
        help="Rounds of coordinate descent over the codes after the solve, each with a re-fit of the scales.",
        least=0,
        published=0,
    )
    refit: bool = option(
        False,
        help="Re-fit scales and zero points by least squares after the codes are chosen; each round of refine does so as well.",
        published=False,
        flag="--refit/--no-refit",
    )
    starved_experts: StarvedExperts = option(
        "shrink",
        help="How the linears of an expert are solved that too few calibration tokens were routed to: shrink, on their Hessian "
        "mixed with the mean of all experts of the layer, the more the fewer the tokens; all_tokens, on the Hessian of all "
        "tokens, as if each were routed to it; rtn, by rounding to nearest.",
        values=get_args(StarvedExperts),
        rule=True,
        published="rtn",
    )
    min_tokens_per_feature: float = option(
        1.0,
        help="How many calibration tokens for each in-feature of its linear an expert needs in order not to count as starved. "
        "With fewer than one its Hessian is singular.",
        least=0,
        rule=True,
        published=0.0,
    )
    damping: float = option(
        0.01,
        help="Added to the Hessian's diagonal before it is factored, as a fraction of the diagonal's mean; raised automatically, "
        "and reported, where it does not suffice.",
        above=0,
        most=1,
        advice="the usual value is 0.01",
    )
    float64: bool = option(
        False, help="Factor the Hessian and solve in double precision.", published=False, flag="--float64/--float32"
    )

    def __post_init__(self) -> None:
        if wrong := problems(self):
            raise ConfigError("; ".join(wrong))

    @property
    def solver(self) -> "SolverConfig":
        """These settings without those of a subclass: a change of what the solver does not read must not recompile it."""
        if type(self) is SolverConfig:
            return self
        return SolverConfig(**{name: getattr(self, name) for name in options(SolverConfig)})

    @property
    def dense(self) -> "SolverConfig":
        """These settings without those of experts alone, which no compiled program reads."""
        defaults = {name: getattr(SolverConfig, name) for name in ("starved_experts", "min_tokens_per_feature")}
        return dataclasses.replace(self, **defaults)

    @property
    def grid_search(self) -> Scale:
        """How scales are chosen, the default resolved."""
        if self.scale is not None:
            return self.scale
        return "minmax" if self.method == "rtn" else "hessian"

    @property
    def improves(self) -> bool:
        """Whether codes or scales change again after the solver's loop."""
        return self.refit or self.refine > 0


RULE_OPTIONS = tuple(name for name, known in options(SolverConfig).items() if known.rule)
"""The options that a rule can set."""

STORED_OPTIONS = tuple(name for name, known in options(SolverConfig).items() if known.stored)
"""The options of each linear without which its packed tensors cannot be read."""
