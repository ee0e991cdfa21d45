"""What the compiled solver depends on: the grid, the method, the order and the damping."""

import dataclasses
from typing import Any, Literal, get_args

from jgptq.errors import ConfigError
from jgptq.settings.options import option, options, problems
from jgptq.settings.sizes import BITS, ROW_MULTIPLE

Method = Literal["gptq", "rtn", "gptaq", "qronos"]
Order = Literal["none", "group", "static", "desc_act"]
Scale = Literal["minmax", "mse", "hessian"]


def _check_group_size(value: Any) -> str | None:
    if isinstance(value, int) and (value == -1 or (value > 0 and value % ROW_MULTIPLE == 0)):
        return None
    return f"group_size must be -1 or a positive multiple of {ROW_MULTIPLE}, found {value!r}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SolverConfig:
    """How one linear is solved. Programs are compiled for these settings and for no others.

    Raises:
      ConfigError: a value is not allowed; the message says which are.
    """

    bits: int = option(4, help="Bits of a weight.", values=BITS, rule=True, stored=True)
    group_size: int = option(
        128,
        help="Rows of K that share a scale: a multiple of 32, or -1 for all of K.",
        check=_check_group_size,
        rule=True,
        stored=True,
    )
    sym: bool = option(
        True,
        help="Symmetric grid, which every reader serves, or asymmetric, with a zero point for each group.",
        rule=True,
        stored=True,
        flag="--sym/--asym",
    )
    method: Method = option(
        "gptq",
        help="gptq; gptaq and qronos, its published asymmetric variants; rtn, round-to-nearest.",
        values=get_args(Method),
        rule=True,
        published="gptq",
    )
    order: Order = option(
        "group",
        help="Order of rows: group (by importance inside and among groups), static (by importance, groups kept) and none cost "
        "nothing when served; desc_act, the classic act-order, needs g_idx.",
        values=get_args(Order),
        rule=True,
        published="none",
    )
    scale: Scale | None = option(
        None,
        help="How a group's scale is chosen: minmax covers the weights, mse has the least |error|^2.4, hessian the least squared "
        "error weighted by diag H. The default is hessian, and minmax for method rtn.",
        values=(*get_args(Scale), None),
        published=None,
    )
    target_shift: float = option(
        1.0,
        help="Fraction of what earlier layers lost in a linear's inputs that the linear makes up for.",
        least=0,
        most=1,
        published=0.0,
    )
    residual_shift: float = option(
        1.0,
        help="The same for what is lost in the residual stream that a linear adds to; method gptq alone.",
        least=0,
        most=1,
        published=0.0,
    )
    refine: int = option(
        0, help="Rounds of coordinate descent over the codes, alternating with re-fitted scales.", least=0, published=0
    )
    refit: bool = option(
        False,
        help="Re-fit scales and zero points once for the chosen codes; every round of refine does so as well.",
        published=False,
        flag="--refit/--no-refit",
    )
    damping: float = option(
        0.01,
        help="Added to the Hessian's diagonal, as a fraction of its mean.",
        above=0,
        most=1,
        advice="the usual value is 0.01",
    )
    float64: bool = option(False, help="Factor and solve in double precision.", published=False, flag="--float64/--float32")

    def __post_init__(self) -> None:
        if wrong := problems(self):
            raise ConfigError("; ".join(wrong))

    @property
    def solver(self) -> "SolverConfig":
        """These settings without those of a subclass, so that nothing is compiled anew for what the solver does not read."""
        if type(self) is SolverConfig:
            return self
        return SolverConfig(**{name: getattr(self, name) for name in options(SolverConfig)})

    @property
    def grid_search(self) -> Scale:
        """How scales are chosen."""
        if self.scale is not None:
            return self.scale
        return "minmax" if self.method == "rtn" else "hessian"

    @property
    def reads_hessian(self) -> bool:
        """Whether a solve needs a Hessian, and so calibration tokens."""
        return self.method != "rtn" or self.grid_search == "hessian"

    @property
    def improves(self) -> bool:
        """Whether codes or scales are moved again after the loop."""
        return self.refit or self.refine > 0

    @property
    def asymmetric(self) -> bool:
        """Whether a solve reads the float model's activations as well as the quantized ones."""
        return self.method != "rtn" and (self.target_shift > 0 or self.shifts_residual)

    @property
    def shifts_residual(self) -> bool:
        """Whether linears that add to the residual stream make up for what it lost."""
        return self.method == "gptq" and self.residual_shift > 0


RULE_OPTIONS = tuple(name for name, known in options(SolverConfig).items() if known.rule)
"""What a rule can set."""

STORED_OPTIONS = tuple(name for name, known in options(SolverConfig).items() if known.stored)
"""What a reader of a checkpoint has to know of each linear."""
