"""The values that a `config.json` may have: one table, by the key's name.

Every key that is read is a line of `KEYS`, of `ROPE` (inside `rope_parameters` or `rope_scaling`) or of `QUANTIZATION` (inside
`quantization_config`). A file's values are checked against them before anything is built of them.
"""

import dataclasses
import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jgptq.errors import CheckpointError
from jgptq.models.architecture.row import Family


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a value has to be."""

    expected: str  # for the message
    accepts: Callable[[Any], bool]


def integer(least: int, most: int) -> Kind:
    """A whole number in a closed range; true and 1.0 are none."""
    return Kind(f"a whole number in [{least}, {most}]", lambda value: type(value) is int and least <= value <= most)


def number(least: float, most: float) -> Kind:
    """A number in a closed range; true and NaN are none."""
    return Kind(f"a number in [{least:g}, {most:g}]", lambda value: type(value) in (int, float) and least <= value <= most)


def list_of(kind: Kind) -> Kind:
    """A list whose entries are all of a kind."""
    return Kind(f"a list, each {kind.expected}", lambda value: isinstance(value, list | tuple) and all(map(kind.accepts, value)))


def optional(kind: Kind) -> Kind:
    """A kind, or null."""
    return Kind(f"{kind.expected} or null", lambda value: value is None or kind.accepts(value))


FLAG = Kind("true or false", lambda value: isinstance(value, bool))
WORD = Kind("a word", lambda value: isinstance(value, str))
OBJECT = Kind("an object", lambda value: isinstance(value, Mapping))
SIZE = integer(1, 2**24)  # of one axis: the product of any two that a model has is counted in 64 bits
HEADS = integer(1, 2**16)
BLOCKS = integer(1, 2**16)
EXPERTS = integer(1, 2**16)
POSITIONS = integer(1, 2**31 - 1)
EPSILON = number(0.0, 1.0)
FACTOR = number(1e-6, 1e6)
THETA = number(1.001, 1e18)  # rotary frequencies are its powers: all would be 1 for a base of 1
SHARE = number(1e-3, 1.0)
PATTERN = Kind(
    "a whole number in [0, 65536], a word or null",
    lambda value: value is None or isinstance(value, str) or integer(0, 2**16).accepts(value),
)

KEYS: Mapping[str, Kind] = {
    "_remove_final_layer_norm": FLAG,
    "activation": WORD,
    "activation_function": WORD,
    "alibi": FLAG,
    "attention_bias": FLAG,
    "attention_multiplier": FACTOR,
    "attention_out_bias": FLAG,
    "attn_logit_softcapping": optional(FACTOR),
    "bias": FLAG,
    "clip_qkv": optional(FACTOR),
    "decoder_sparse_step": optional(integer(1, 2**16)),
    "do_layer_norm_before": FLAG,
    "dtype": optional(WORD),
    "embedding_multiplier": FACTOR,
    "enable_bias": FLAG,
    "ffn_dim": SIZE,
    "ffn_hidden_size": optional(SIZE),
    "final_logit_softcapping": optional(FACTOR),
    "first_k_dense_replace": optional(integer(0, 2**16)),
    "head_dim": optional(HEADS),
    "hidden_act": WORD,
    "hidden_activation": WORD,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "kv_lora_rank": SIZE,
    "layer_norm_elementwise_affine": FLAG,
    "layer_norm_eps": EPSILON,
    "layer_norm_epsilon": EPSILON,
    "layer_types": optional(list_of(WORD)),
    "logit_scale": FACTOR,
    "logits_scaling": FACTOR,
    "max_position_embeddings": POSITIONS,
    "max_window_layers": integer(0, 2**16),
    "mlp_bias": FLAG,
    "mlp_only_layers": optional(list_of(integer(0, 2**16))),
    "moe_intermediate_size": SIZE,
    "multi_query": FLAG,
    "n_embd": SIZE,
    "n_embed": SIZE,
    "n_group": optional(EXPERTS),
    "n_head": HEADS,
    "n_inner": optional(SIZE),
    "n_layer": BLOCKS,
    "n_positions": POSITIONS,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": optional(integer(0, 2**16)),
    "new_decoder_architecture": FLAG,
    "no_rope_layer_interval": integer(1, 2**16),
    "no_rope_layers": optional(list_of(integer(0, 1))),
    "norm_eps": EPSILON,
    "norm_epsilon": EPSILON,
    "norm_topk_prob": FLAG,
    "num_attention_heads": HEADS,
    "num_experts": EXPERTS,
    "num_experts_per_tok": EXPERTS,
    "num_hidden_layers": BLOCKS,
    "num_key_value_heads": optional(HEADS),
    "num_kv_heads": optional(HEADS),
    "num_ln_in_parallel_attn": optional(integer(1, 2)),
    "num_local_experts": EXPERTS,
    "original_max_position_embeddings": optional(POSITIONS),
    "parallel_attn": FLAG,
    "partial_rotary_factor": optional(SHARE),
    "q_lora_rank": optional(SIZE),
    "qk_layernorm": FLAG,
    "qk_nope_head_dim": HEADS,
    "qk_rope_head_dim": HEADS,
    "qkv_bias": FLAG,
    "quantization_config": optional(OBJECT),
    "query_pre_attn_scalar": optional(FACTOR),
    "residual_multiplier": FACTOR,
    "rms_norm_eps": EPSILON,
    "rope_interleave": FLAG,
    "rope_local_base_freq": optional(THETA),
    "rope_parameters": optional(OBJECT),
    "rope_scaling": optional(OBJECT),
    "rope_theta": optional(THETA),
    "rotary_dim": optional(HEADS),
    "rotary_emb_base": optional(THETA),
    "rotary_pct": optional(SHARE),
    "routed_scaling_factor": FACTOR,
    "seq_length": POSITIONS,
    "shared_expert_intermediate_size": integer(0, 2**24),
    "sliding_window": optional(integer(0, 2**31 - 1)),  # 0 where transformers writes that there is none
    "sliding_window_pattern": PATTERN,
    "tie_word_embeddings": FLAG,
    "topk_group": optional(EXPERTS),
    "topk_method": WORD,
    "torch_dtype": optional(WORD),
    "use_bias": FLAG,
    "use_parallel_residual": FLAG,
    "use_qk_norm": FLAG,
    "use_qkv_bias": FLAG,
    "use_sliding_window": FLAG,
    "v_head_dim": HEADS,
    "vocab_size": SIZE,
    "word_embed_proj_dim": optional(SIZE),
}
"""Keys of a `config.json`: those that a row names, and those of the three lists below."""

READ_FOR_ALL = ("dtype", "quantization_config", "torch_dtype")
READ_FOR_ROTARY = (
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
)
READ_FOR_WINDOWS = ("layer_types", "max_window_layers", "sliding_window", "use_sliding_window")
"""Keys that no row names: those of all families, of families with rotary positions, and of families with a window."""

BLOCK_KINDS = ("full_attention", "sliding_attention")
"""Keys of rotary settings that hold the settings of one kind of block each."""

ROPE: Mapping[str, Kind] = {
    "attention_factor": optional(FACTOR),
    "beta_fast": optional(FACTOR),
    "beta_slow": optional(FACTOR),
    "factor": optional(FACTOR),
    "full_attention": optional(OBJECT),
    "high_freq_factor": optional(FACTOR),
    "long_factor": optional(list_of(FACTOR)),
    "low_freq_factor": optional(FACTOR),
    "mscale": optional(number(0.0, 1e6)),
    "mscale_all_dim": optional(number(0.0, 1e6)),
    "original_max_position_embeddings": optional(POSITIONS),
    "partial_rotary_factor": optional(SHARE),
    "rope_theta": optional(THETA),
    "rope_type": optional(WORD),
    "short_factor": optional(list_of(FACTOR)),
    "sliding_attention": optional(OBJECT),
    "truncate": optional(FLAG),
    "type": optional(WORD),
}
"""Keys of the rotary settings, which may be those of a kind of block each."""

QUANTIZATION: Mapping[str, Kind] = {
    "bits": optional(integer(1, 32)),
    "checkpoint_format": optional(WORD),
    "dynamic": optional(OBJECT),
    "format": optional(WORD),
    "group_size": optional(integer(-1, 2**24)),
    "lm_head": optional(FLAG),
    "meta": optional(OBJECT),
    "quant_method": optional(WORD),
    "sym": optional(FLAG),
}
"""Keys of the quantization settings that are read. Which of them a method needs is the method's own."""


def read_keys(family: Family) -> set[str]:
    """The keys of `KEYS` that are read for a family."""
    rotary = READ_FOR_ROTARY if family.positions not in ("learned", "alibi") and family.rotary_dim is None else ()
    windows = READ_FOR_WINDOWS if family.window is not None else ()
    period = {family.window.period_key} if family.window is not None and family.window.period_key is not None else set()
    return family.names.union(READ_FOR_ALL, [family.positions_key], rotary, windows, period)


def problems(values: Mapping[str, Any], kinds: Mapping[str, Kind], names: Iterable[str], within: str = "") -> list[str]:
    """A sentence for each value that is not of its kind.

    Args:
      values: an object of a `config.json`.
      kinds: what its values have to be.
      names: the keys that are read; those that the object does not have are passed over.
      within: the key of the object in the file, for the message.
    """
    prefix = f"{within}." if within else ""
    return [
        f"{prefix}{name}: expected {kinds[name].expected}, found {reprlib.repr(values[name])}"
        for name in names
        if name in values and not kinds[name].accepts(values[name])
    ]


def refuse(sentences: Iterable[str], file: str = "config.json") -> None:
    """Raises all problems of a config as one error.

    Raises:
      CheckpointError: there are any.
    """
    found = list(sentences)
    if found:
        raise CheckpointError(f"{file}: " + "\n  ".join(found) + "\n  correct these values, or fetch the file again")
