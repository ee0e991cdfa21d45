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
    aliases: tuple[str, ...] = ()  # other names of the key, which take precedence as in transformers

    def given(self, hf: Mapping[str, Any]) -> Any:
        """What a file says, or the default where it is silent."""
        alias = next((hf[name] for name in self.aliases if hf.get(name) is not None), None)
        return hf.get(self.name, self.default) if alias is None else alias

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
        patterned    those of `layer_types`, or else all but every `period`-th
        unrotated    those of `layer_types`, or else, where `use_sliding_window` is true, those without rotation
    """

    default: int | None  # the width where the file is silent; None: no window then
    blocks: str = "opt_in"
    period: int | None = None  # of patterned blocks; None: all of them slide
    period_key: str | None = None  # where the file says it


SPARSE_BLOCKS: Mapping[str, Mapping[str, Any]] = {
    "all": {},
    "after_first": {"first_k_dense_replace": None},
    "stepped": {"decoder_sparse_step": 1, "mlp_only_layers": None},
}
"""Which blocks of a family have experts -> the keys that say it, with what a silent file means."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """How a `config.json` describes a mixture of experts."""

    keys: Mapping[str, Key]  # switch of `ExpertsConfig` -> where it stands in the file
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # switches that all models of the family share
    first_dense: int = 0  # of blocks "after_first": how many are dense where the file is silent
    blocks: str = "all"  # which blocks have it, a key of `SPARSE_BLOCKS`; see `hf_experts.sparse_layers`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture, or one of the forms that an architecture's files have."""

    hf_class: str  # transformers' class, for `architectures`
    keys: Mapping[str, Key]  # switch of `ModelConfig` -> where it stands in the file
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # switches that all models of the family share
    model_type: str | None = None  # of its files; None: the row's name. Rows that share one differ in `where`
    where: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)  # key -> its values in files of this row
    positions: str | Key = "rotary"  # rotary, learned or alibi, or the key that says which
    positions_key: str = "max_position_embeddings"  # the key of how many positions there are
    max_positions: int = 2048  # its value where the file is silent
    position_offset: int = 0  # of learned positions: the row of the table that belongs to position 0
    partial_rotary: float | None = None  # part of a head that is rotated, where the file is silent; None: all of it, always
    rotary_dim: Key | None = None  # where files say how many features of a head are rotated, and nothing else of rotary positions
    rotary_keys: Mapping[str, str] = dataclasses.field(default_factory=dict)  # its name of a rotary setting -> the usual one
    rotary_defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # settings of a file that is silent on them
    rope_types: Mapping[str, str] = dataclasses.field(default_factory=dict)  # older names of scalings -> those of today
    rotated: str = "all"  # which blocks rotate queries and keys, see `jgptq.models.architecture.per_layer`
    local_theta: Key | None = None  # where the base wavelength of sliding blocks stands, if it is their own
    alibi: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # fields of `AlibiPositions` that the family shares
    latent: Mapping[str, Key] | None = None  # switch of `LatentConfig` -> where it stands in the file; None: it has none
    experts: Mixture | None = None  # None: every MLP is dense
    window: Window | None = None  # None: attention sees all positions
    decoder: str = "model"  # what stands before the names of all modules but the output projection
    blocks: str = "layers"  # the name of the list of blocks
    head: str = "lm_head"  # the name of the output projection
    conv1d: bool = False  # the kernels of blocks are stored as [K, N], in transformers' Conv1D; else as Torch's [N, K]
    buffers: tuple[str, ...] = ()  # endings of constants that old files hold and no model reads
    modules: Mapping[str, str] = dataclasses.field(default_factory=dict)  # path in a block, or top-level name -> name in the file

    @property
    def all_keys(self) -> tuple[Key, ...]:
        """Where all switches of the decoder stand, those of latent attention and of experts too."""
        latent, experts = self.latent or {}, {} if self.experts is None else self.experts.keys
        return (*self.keys.values(), *latent.values(), *experts.values())

    @property
    def names(self) -> set[str]:
        """Names of all keys of a file by which the row reads a switch."""
        single = [key for key in (self.positions, self.rotary_dim, self.local_theta) if isinstance(key, Key)]
        named = {name for key in (*self.all_keys, *single) for name in (key.name, *key.aliases)}
        listed = {"no_rope_layers", "no_rope_layer_interval"} if self.rotated == "listed" else set()
        sparse = () if self.experts is None else SPARSE_BLOCKS[self.experts.blocks]
        return named.union(self.where, self.rotary_keys, listed, sparse)
