"""Settings of a quantization run: one frozen dataclass, checked when it is made."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, get_args

from jgptq.errors import ConfigError

Method = Literal["gptq", "rtn", "gptaq", "qronos"]
Order = Literal["none", "group", "static", "desc_act"]
Scale = Literal["minmax", "mse", "hessian"]
Preset = Literal["fast", "balanced", "best"]

BITS = (2, 3, 4, 8)
ROW_MULTIPLE = 32
"""K and N of a packed linear, and every group size, are multiples of this: 32 codes fill whole int32 words at any bit width."""


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
    tune: int = 0  # steps of gradient descent on scales and norms against the float model's logits, after the last block
    damping: float = 0.01  # added to the Hessian's diagonal, as a fraction of its mean
    float64: bool = False  # factor and solve in double precision
    allow_rtn_fallback: bool = False  # a linear that cannot be solved is rounded to nearest and reported, not an error

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
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def grid_search(self) -> Scale:
        """How scales are chosen."""
        if self.scale is not None:
            return self.scale
        return "minmax" if self.method == "rtn" else "hessian"

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

PRESETS: Mapping[Preset, Mapping[str, Any]] = MappingProxyType(
    {
        "fast": MappingProxyType({"target_shift": 0.0, "residual_shift": 0.0}),
        "balanced": MappingProxyType({}),
        "best": MappingProxyType({"refine": 3, "tune": 24}),
    }
)
"""What each preset sets beside the defaults. All give plain files that cost nothing more when served; they differ in time."""


def make_config(settings: Mapping[str, Any]) -> QuantizeConfig:
    """The config that keyword settings describe: those of `preset`, where one is named, under all that are given beside it.

    Args:
      settings: fields of `QuantizeConfig`, and optionally `preset`: "fast", "balanced" (the defaults) or "best".

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
    return QuantizeConfig(**{**PRESETS[preset], **given})


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
