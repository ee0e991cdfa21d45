"""A row of the table of architectures: which keys a `config.json` has, which switches the family shares, and its names."""

import dataclasses
from collections.abc import Mapping
from typing import Any

REQUIRED = object()
"""The default of a key that every file has to have."""


@dataclasses.dataclass(frozen=True)
class Key:
    """Where a switch of `ModelConfig` stands in a `config.json`."""

    name: str
    default: Any = REQUIRED  # what the file says where it is silent
    values: Mapping[Any, Any] = dataclasses.field(default_factory=dict)  # what the file says -> the switch, where they differ

    def read(self, stored: Any) -> Any:
        """The switch that the file's value stands for."""
        return self.values.get(stored, stored)

    def stored(self, switch: Any) -> Any:
        """The file's value that stands for a switch; the last one where there are several."""
        return next((stored for stored, read in reversed(list(self.values.items())) if read == switch), switch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
    """How a `config.json` limits attention to a sliding window.

    The blocks that it limits are one of

        all          every block
        opt_in_all   every block where `use_sliding_window` is true
        opt_in       where `use_sliding_window` is true, those of `layer_types`, or else those from `max_window_layers` on
        opt_in_even  where `use_sliding_window` is true, those of `layer_types`, or else every other block before
                     `max_window_layers`, beginning with the first
        alternating  those of `layer_types`, or else every other block, beginning with the first
    """

    default: int | None  # the width where the file is silent
    blocks: str = "opt_in"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """How a `config.json` describes a mixture of experts."""

    keys: Mapping[str, Key]  # switch of `ExpertsConfig` -> where it stands in the file
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # switches that all models of the family share
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)  # other names of keys -> the names in `keys`
    first_dense: int = 0  # of blocks "after_first": how many are dense where the file is silent
    blocks: str = "all"  # which blocks have it, see `jgptq.models.architecture.hf_experts.sparse_layers`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture."""

    hf_class: str  # transformers' class, for `architectures`
    keys: Mapping[str, Key]  # switch of `ModelConfig` -> where it stands in the file
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # switches that all models of the family share
    positions: str = "rotary"  # rotary or learned
    max_positions: int = 2048  # of `max_position_embeddings`, where the file is silent
    rope_theta: float = 10000.0  # base wavelength of rotary positions, where the file is silent
    position_offset: int = 0  # of learned positions: the row of the table that belongs to position 0
    partial_rotary: float | None = None  # part of a head that is rotated, where the file is silent; None: all of it, always
    latent: Mapping[str, Key] | None = None  # switch of `LatentConfig` -> where it stands in the file; None: it has none
    experts: Mixture | None = None  # None: every MLP is dense
    window: Window | None = None  # None: attention sees all positions
    decoder: str = "model"  # what stands before the names of all modules but the output projection
    modules: Mapping[str, str] = dataclasses.field(default_factory=dict)  # path in a block, or top-level name -> name in the file
