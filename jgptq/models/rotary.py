"""Rotary position embedding and its scalings.

Rotary embedding: RoFormer, arXiv 2104.09864. Scalings: linear (position interpolation, arXiv 2306.15595), dynamic NTK, YaRN
(arXiv 2309.00071), LongRoPE (arXiv 2402.13753), and the piecewise rule of Llama 3.1 (arXiv 2407.21783).
"""

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jgptq.errors import ArchitectureError, CheckpointError
from jgptq.notation import Float

_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("original_max_position_embeddings",),
    "longrope": ("long_factor", "short_factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary settings; field names equal the keys of a Hugging Face config."""

    rope_type: str = "default"  # one of default, linear, dynamic, yarn, longrope, llama3
    rope_theta: float = 10000.0  # base wavelength
    partial_rotary_factor: float = 1.0  # part of a head's features that is rotated, the first ones
    max_position_embeddings: int = 2048  # positions that the model as a whole accepts
    original_max_position_embeddings: int | None = None  # positions seen before the context was extended
    factor: float | None = None  # how many times longer the context became
    attention_factor: float | None = None  # multiplies cos and sin; None derives it (yarn, longrope)
    beta_fast: float | None = None  # yarn: rotations above which a frequency is kept
    beta_slow: float | None = None  # yarn: rotations below which a frequency is interpolated
    mscale: float | None = None  # yarn: numerator of the derived attention factor
    mscale_all_dim: float | None = None  # yarn: its denominator
    truncate: bool = True  # yarn: round the range of corrected dimensions to integers
    low_freq_factor: float | None = None  # llama3
    high_freq_factor: float | None = None  # llama3
    short_factor: tuple[float, ...] | None = None  # longrope, one divisor per frequency
    long_factor: tuple[float, ...] | None = None  # longrope, beyond the original context

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], head_dim: int, partial: float | None = None) -> "RopeConfig":
        """Reads the rotary settings of a Hugging Face config, in the old (`rope_scaling`) or new (`rope_parameters`) form.

        Args:
          config: the parsed `config.json`.
          head_dim: features of one attention head, to check the length of per-frequency lists.
          partial: the default of `partial_rotary_factor`; None where the architecture rotates whole heads always.

        Raises:
          ArchitectureError: an unknown scaling (the message lists those known), or heads that are rotated in part where the
            architecture does not do so.
          CheckpointError: a setting that the scaling needs is missing or has the wrong length.
        """
        # Where a file has both forms, transformers reads the old one.
        forms = config.get("rope_scaling") or config.get("rope_parameters") or {}
        given = {key: value for key, value in forms.items() if value is not None}
        parted = sorted(key for key, value in given.items() if isinstance(value, Mapping))
        if parted:
            raise ArchitectureError(f"config.json: rotary settings of their own for {', '.join(parted)} are not implemented")
        rope_type = given.pop("rope_type", None) or given.pop("type", None) or "default"
        given.pop("type", None)
        if rope_type not in _REQUIRED:
            found = reprlib.repr(rope_type)
            raise ArchitectureError(f"config.json: rotary scaling {found} is not known; known are {', '.join(_REQUIRED)}")
        default = 1.0 if partial is None else partial
        given.setdefault("partial_rotary_factor", config.get("partial_rotary_factor") or default)
        if partial is None and given["partial_rotary_factor"] != 1.0:
            raise ArchitectureError(
                f"config.json: partial_rotary_factor {given['partial_rotary_factor']} (expected 1) is not implemented"
            )
        maximum = config.get("max_position_embeddings", 2048)
        given.setdefault("rope_theta", config.get("rope_theta") or 10000.0)
        if rope_type in ("llama3", "yarn", "longrope"):
            given.setdefault("original_max_position_embeddings", maximum)
            # Phi-3 writes it at the top level of config.json; that value takes precedence over the one in the rotary settings.
            if config.get("original_max_position_embeddings") is not None:
                given["original_max_position_embeddings"] = config["original_max_position_embeddings"]
        rotated = _rotated(head_dim, given["partial_rotary_factor"])
        missing = [key for key in _REQUIRED[rope_type] if given.get(key) is None]
        if missing:
            raise CheckpointError(f"config.json: rotary scaling {rope_type!r} needs {', '.join(missing)}")
        for key in ("short_factor", "long_factor"):
            if given.get(key) is not None:
                given[key] = tuple(given[key])
                if len(given[key]) != rotated // 2:
                    length = len(given[key])
                    raise CheckpointError(f"config.json: {key} needs {rotated // 2} numbers, half of head_dim, found {length}")
        _check_relations(rope_type, given, rotated)
        fields = {field.name for field in dataclasses.fields(cls)}
        kept = {key: value for key, value in given.items() if key in fields and value is not None}
        return cls(rope_type=rope_type, max_position_embeddings=maximum, **kept)

    def rotated(self, head_dim: int) -> int:
        """Features of a head that are rotated."""
        return _rotated(head_dim, self.partial_rotary_factor)

    @property
    def score_factor(self) -> float:
        """What latent attention multiplies its scores by: the square of YaRN's factor for `mscale_all_dim`, one without it."""
        if self.rope_type == "default" or not self.mscale_all_dim or _number(self.factor) <= 1:
            return 1.0
        return (0.1 * self.mscale_all_dim * math.log(_number(self.factor)) + 1.0) ** 2

    def to_hf(self) -> dict[str, Any]:
        """The `rope_parameters` object of a Hugging Face config that `from_hf` reads back."""
        items = dataclasses.asdict(self).items()
        skipped = {"max_position_embeddings"} | (set() if self.rope_type == "yarn" else {"truncate"})
        return {key: value for key, value in items if key not in skipped and value is not None}


def _check_relations(rope_type: str, given: Mapping[str, Any], rotated: int) -> None:
    """Refuses settings that are allowed one by one and have no frequencies together.

    Raises:
      CheckpointError: an odd number of rotated features, or a division by zero.
    """
    if rotated % 2:
        raise CheckpointError(f"config.json: rotary positions need an even number of features of a head, found {rotated}")
    if rope_type == "dynamic" and rotated == 2:
        raise CheckpointError("config.json: rotary scaling 'dynamic' needs more than 2 rotated features of a head, found 2")
    if rope_type == "llama3" and given["low_freq_factor"] >= given["high_freq_factor"]:
        low, high = given["low_freq_factor"], given["high_freq_factor"]
        raise CheckpointError(f"config.json: expected low_freq_factor below high_freq_factor, found {low} and {high}")
    if rope_type == "longrope" and given["original_max_position_embeddings"] == 1:
        raise CheckpointError("config.json: rotary scaling 'longrope' needs original_max_position_embeddings above 1, found 1")


def rotary_tables(
    rope: RopeConfig, head_dim: int, length: int
) -> tuple[Float[jax.Array, "S rotated"], Float[jax.Array, "S rotated"]]:
    """The cosines and sines that rotate queries and keys at positions 0..length-1.

    Args:
      rope: rotary settings.
      head_dim: F, features of one head.
      length: S, positions; dynamic NTK and LongRoPE choose their frequencies by it.

    Returns:
      Two float32 arrays `[S, partial_rotary_factor * F]` over the features that are rotated, multiplied by the attention factor;
      the second half of them repeats the first.
    """
    inverse, factor = _inverse_frequencies(rope, rope.rotated(head_dim), length)
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * jnp.asarray(inverse, jnp.float32)[None, :]
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(
    x: Float[jax.Array, "b S H F"],
    cos: Float[jax.Array, "S rotated"],
    sin: Float[jax.Array, "S rotated"],
    pairs: str = "halves",
) -> Float[jax.Array, "b S H F"]:
    """Rotates pairs of features by the tables' angles, in the dtype of `x` as the reference models do.

    Args:
      x: queries or keys `[b, S, H, F]`; of heads that are rotated in part, the first R features are.
      cos: cosines `[S, R]`, of which the second half repeats the first.
      sin: sines, the same.
      pairs: "halves", pairs (f, f + R/2), or "neighbours", pairs (2f, 2f + 1).

    Returns:
      The rotated queries or keys.
    """
    width = cos.shape[-1]
    if width < x.shape[-1]:
        return jnp.concatenate([rotate(x[..., :width], cos, sin, pairs), x[..., width:]], axis=-1)
    half = width // 2
    if pairs == "neighbours":
        turned = jnp.stack([-x[..., 1::2], x[..., 0::2]], axis=-1).reshape(x.shape)
        cos, sin = jnp.repeat(cos[:, :half], 2, axis=-1), jnp.repeat(sin[:, :half], 2, axis=-1)
    else:
        turned = jnp.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    shape = (1, x.shape[1], 1, x.shape[3])
    return x * cos.astype(x.dtype).reshape(shape) + turned * sin.astype(x.dtype).reshape(shape)


def _rotated(head_dim: int, factor: float) -> int:
    """A part of the features of a head; a factor that is a ratio of whole numbers may fall short of it by rounding."""
    return int(head_dim * factor + 1e-6)


def _inverse_frequencies(rope: RopeConfig, width: int, length: int) -> tuple[np.ndarray, float]:
    """Inverse frequencies `[width/2]` in float64 and the factor on cos and sin."""
    exponents = np.arange(0, width, 2) / width
    base = rope.rope_theta
    if rope.rope_type == "linear":
        return base**-exponents / _number(rope.factor), 1.0
    if rope.rope_type == "dynamic":
        stretch = _number(rope.factor) * max(length, rope.max_position_embeddings) / rope.max_position_embeddings
        base *= (stretch - (_number(rope.factor) - 1)) ** (width / (width - 2))
    if rope.rope_type == "yarn":
        return _yarn(rope, width, base**-exponents)
    if rope.rope_type == "longrope":
        original = _number(rope.original_max_position_embeddings)
        divisors = rope.long_factor if length > original else rope.short_factor
        factor = rope.factor if rope.factor is not None else rope.max_position_embeddings / original
        derived = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
        return base**-exponents / np.asarray(divisors), derived if rope.attention_factor is None else rope.attention_factor
    if rope.rope_type == "llama3":
        return _llama3(rope, base**-exponents), 1.0
    return base**-exponents, 1.0


def _yarn(rope: RopeConfig, width: int, inverse: np.ndarray) -> tuple[np.ndarray, float]:
    """Interpolates slow frequencies, keeps fast ones, and ramps between: YaRN section 3.2, attention factor section 3.4."""
    original = _number(rope.original_max_position_embeddings)
    factor = rope.factor if rope.factor is not None else rope.max_position_embeddings / original

    def dimension(rotations: float) -> float:
        return width * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    def attention(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    low, high = dimension(rope.beta_fast or 32), dimension(rope.beta_slow or 1)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    span = high - low if high != low else 0.001
    interpolated = np.clip((np.arange(width // 2) - low) / span, 0, 1)
    mixed = inverse / factor * interpolated + inverse * (1 - interpolated)
    if rope.attention_factor is not None:
        return mixed, rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mixed, attention(rope.mscale) / attention(rope.mscale_all_dim)
    return mixed, attention(1.0)


def _llama3(rope: RopeConfig, inverse: np.ndarray) -> np.ndarray:
    """Divides long wavelengths by the factor, keeps short ones, and blends between."""
    original, factor = _number(rope.original_max_position_embeddings), _number(rope.factor)
    low, high = _number(rope.low_freq_factor), _number(rope.high_freq_factor)
    wavelength = 2 * math.pi / inverse
    blend = np.clip((original / wavelength - low) / (high - low), 0, 1)
    return (1 - blend) * inverse / factor + blend * inverse


def _number(value: float | None) -> float:
    """A field that `from_hf` has checked to be there for this scaling."""
    if value is None:
        raise CheckpointError("rotary settings lack a number that their rope_type needs; build them with RopeConfig.from_hf")
    return value
