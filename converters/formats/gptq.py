"""GPTQ files, version 1 and 2.

A linear is `qweight` int32 `[K*bits/32, N]`, `qzeros` int32 `[G, N*bits/32]`, `scales` `[G, N]` and `g_idx` int32 `[K]`. Codes
and zero points are dense streams of bits (`pallas_kernels.packing`). Version 1 stores zero points less one, version 2 as
they are.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from converters.formats.architectures import architecture_warnings
from converters.formats.base import INT32, Format, Layout, Written
from converters.formats.settings import HEAD, check_patterns, meta_of, patterns, recorded, used_settings
from converters.formats.words import constant_words
from converters.output.shards import TensorSpec
from jgptq.errors import ArchitectureError, CheckpointError, ConfigError
from jgptq.models import ModelConfig, checkpoint_name
from jgptq.models.packed import PackedTensor
from jgptq.settings.rule import Rule
from jgptq.settings.rules import first_match, rules_from_dynamic, stored_rules
from jgptq.settings.run import QuantizeConfig
from jgptq.settings.sizes import BITS, group_rows
from jgptq.settings.solver import STORED_OPTIONS, SolverConfig
from pallas_kernels.packing import pack_codes, unpack_codes

VLLM_GROUPS = (-1, 32, 64, 128)
GPTQMODEL_GROUPS = (-1, 16, 32, 64, 128, 256, 512, 1024)
"""Group sizes that programs accept."""
SERVING = """- GPTQModel: `GPTQModel.load(FOLDER)`.
- transformers, through GPTQModel and optimum: `AutoModelForCausalLM.from_pretrained(FOLDER)`.
- vLLM: `vllm serve FOLDER`; symmetric grids of 4 and 8 bits only.
- JAX: `converters.load_hf(FOLDER)`."""


@dataclasses.dataclass(frozen=True)
class GptqReader:
    """Decodes linears of either version.

    Bits and group follow from the shapes, whatever the config says; the group size that it declares, where that fits them too.
    """

    quantization: Mapping[str, Any]
    version: int
    rules: tuple[Rule, ...]  # of the config, reduced to what tensors depend on
    required: ClassVar[tuple[str, ...]] = ("qweight", "scales", "qzeros")
    optional: ClassVar[tuple[str, ...]] = ("g_idx",)

    @property
    def settings(self) -> QuantizeConfig:
        """`converters.formats.base.Reader.settings`."""
        return read_settings(self.quantization)

    def decode(self, name: str, shape: tuple[int, int], parts: Mapping[str, np.ndarray]) -> PackedTensor:
        """`converters.formats.base.Reader.decode`."""
        k, n = shape
        if any(parts[part].ndim != 2 for part in self.required):
            raise CheckpointError(f"{name}: qweight, scales and qzeros must be matrices")
        bits, remainder = divmod(parts["qweight"].shape[0] * 32, k)
        groups = parts["scales"].shape[0]
        if remainder or bits not in BITS or groups == 0 or parts["qzeros"].shape != (groups, n * bits // 32):
            shapes = ", ".join(f"{part} {list(parts[part].shape)}" for part in self.required)
            raise CheckpointError(f"{name}: {shapes} fit no width of {BITS} for K={k}, N={n}")
        declared = self._declared(name)
        group_size = declared if groups == -(-k // group_rows(k, declared)) else (-1 if groups == 1 else k // groups)
        return PackedTensor(
            qweight=parts["qweight"],
            scales=parts["scales"],
            zeros=_decode_zeros(parts["qzeros"], bits, self.version),
            group_index=stored_groups(f"{name}.g_idx", parts.get("g_idx"), k, group_rows(k, group_size), groups),
            bits=bits,
            group_size=group_size,
            shape=shape,
        )

    def _declared(self, name: str) -> int:
        """The group size that the config declares for a linear."""
        rule = first_match(self.rules, name)
        size = self.quantization["group_size"]
        return size if rule is None else rule.overrides.get("group_size", size)


@dataclasses.dataclass(frozen=True)
class GptqWriter:
    """Encodes linears in one version."""

    version: int
    packs: ClassVar[bool] = True
    scales: ClassVar[str] = "scales"
    config_file: ClassVar[str | None] = "quantize_config.json"
    serving: ClassVar[str] = SERVING

    @property
    def name(self) -> str:
        """The format's name, which its config states as `checkpoint_format`."""
        return "gptq" if self.version == 1 else "gptq_v2"

    def refusal(self, settings: SolverConfig) -> str | None:
        """`converters.formats.base.Writer.refusal`."""
        if self.version == 2 or settings.sym:
            return None
        message = "format 'gptq' (v1) stores zero - 1, so it cannot hold the zero points of asymmetric grids"
        return f"{message}; use 'gptq_v2' (--format gptq_v2)"

    def warnings(self, config: QuantizeConfig, model: ModelConfig, reordered: bool = False) -> list[str]:
        """`converters.formats.base.Writer.warnings`."""
        sentences = [sentence for settings in used_settings(config) for sentence in _refusals(settings)]
        if config.rules or config.lm_head:
            sentences.append(
                "transformers reads no rules and no quantized lm_head (5.23 with optimum 2.3), and may load other weights "
                "without an error; GPTQModel and vLLM read both"
            )
        sentences += architecture_warnings(model)
        if reordered:
            sentences.append("vLLM refuses desc_act with groups; GPTQModel loads it")
        return list(dict.fromkeys(sentences))

    def specs(self, name: str, layout: Layout) -> list[TensorSpec]:
        """`converters.formats.base.Writer.specs`."""
        (k, n), groups = layout.shape, layout.groups
        return [
            TensorSpec(f"{name}.qweight", INT32, (k * layout.bits // 32, n)),
            TensorSpec(f"{name}.qzeros", INT32, (groups, n * layout.bits // 32)),
            TensorSpec(f"{name}.scales", layout.scale_dtype, (groups, n)),
            TensorSpec(f"{name}.g_idx", INT32, (k,)),
        ]

    def encode(self, name: str, packed: PackedTensor, layout: Layout) -> dict[str, np.ndarray]:
        """`converters.formats.base.Writer.encode`."""
        k, _ = packed.shape
        zeros = packed.zeros
        if zeros is None:
            zeros = constant_words(2 ** (packed.bits - 1) - (self.version == 1), packed.bits, packed.scales.shape)
        elif self.version == 1:
            raise ConfigError(f"{name}: GPTQ v1 cannot hold the zero points of an asymmetric grid; use format 'gptq_v2'")
        contiguous = np.arange(k, dtype=np.int32) // group_rows(k, packed.group_size)
        return {
            f"{name}.qweight": np.asarray(packed.qweight),
            f"{name}.qzeros": np.asarray(zeros),
            f"{name}.scales": np.asarray(packed.scales),
            f"{name}.g_idx": contiguous if packed.group_index is None else np.asarray(packed.group_index),
        }

    def quantization_config(self, written: Written) -> dict[str, Any]:
        """The `quantization_config` object, as GPTQModel, transformers and vLLM read it.

        `dynamic` says what each linear is, in rules of which one at most matches any name: GPTQModel puts rules that skip before
        all others, vLLM asks for the names of fused linears, and neither may change the meaning. The run's own rules stand in
        `meta`.
        """
        config = written.run
        result: dict[str, Any] = {
            "quant_method": "gptq",
            "method": "gptq",
            "bits": config.bits,
            "group_size": config.group_size,
            "desc_act": bool(written.reordered),
            "sym": config.sym,
            "lm_head": written.linears.get(HEAD) is not None,
            "checkpoint_format": self.name,
            "format": self.name,
            "pack_dtype": "int32",
            "meta": meta_of(config),
        }
        if dynamic := dynamic_rules(config, written.linears, written.model):
            result["dynamic"] = dynamic
        return result


def dynamic_rules(
    config: QuantizeConfig, linears: Mapping[str, SolverConfig | None], model: ModelConfig
) -> dict[str, dict[str, Any]]:
    """Rules that tell readers which linears are float, and which have other settings than the config's: one for each kind and
    settings. No name is matched by two of them, as long as fused linears agree."""
    base = _stored_settings(config)

    def changes(path: str, settings: SolverConfig | None) -> tuple[tuple[str, Any], ...] | None:
        return None if settings is None else tuple(sorted(_stored_settings(settings).items() - base.items()))

    rules: dict[str, dict[str, Any]] = {}
    if (head := changes(HEAD, linears.get(HEAD))) is not None and head:  # a head is float unless it is declared
        rules[f"+:^{re.escape(checkpoint_name(HEAD, model.model_type))}$"] = dict(head)
    for pattern, changed in patterns(linears, model, changes):
        if changed != ():
            rules[f"{'-' if changed is None else '+'}:{pattern}"] = dict(changed or ())
    return rules


def read_settings(quantization: Mapping[str, Any]) -> QuantizeConfig:
    """The settings that a GPTQ folder was written under, as far as its `quantization_config` records them.

    Raises:
      CheckpointError: rules that cannot be read.
    """
    meta = quantization.get("meta") or {}
    own = meta.get("rules")
    try:
        return QuantizeConfig(
            bits=quantization["bits"],
            group_size=quantization["group_size"],
            sym=quantization.get("sym", True),
            **recorded(meta),
            rules=stored_rules(quantization.get("dynamic")) if own is None else rules_from_dynamic(own),
            lm_head=bool(quantization.get("lm_head", False)),
        )
    except ConfigError as error:
        raise CheckpointError(f"config.json: quantization_config cannot be read: {error}") from None


def stored_groups(name: str, stored: np.ndarray | None, k: int, rows: int, groups: int) -> np.ndarray | None:
    """The group of each row `[K]`, or None where groups are contiguous and whole.

    Raises:
      CheckpointError: groups that there are not.
    """
    contiguous = np.arange(k, dtype=np.int32) // rows
    if stored is None or np.array_equal(stored, contiguous):
        return None if k % rows == 0 else contiguous
    if stored.size and (stored.min() < 0 or stored.max() >= groups):
        raise CheckpointError(f"{name} holds groups {stored.min()} to {stored.max()}, there are {groups}")
    return np.asarray(stored)


def _reader(version: int, quantization: Mapping[str, Any]) -> GptqReader:
    """The reader, once what it reads of the config has been checked."""
    stated = _stated_version(quantization)
    if stated not in ("gptq", "gptq_v2"):
        raise ArchitectureError(f"config.json: checkpoint_format {stated!r} cannot be read; expected 'gptq' or 'gptq_v2'")
    group_size = quantization.get("group_size")
    if (
        not isinstance(quantization.get("bits"), int)
        or not isinstance(group_size, int)
        or not (group_size == -1 or group_size > 0)
    ):
        raise CheckpointError("config.json: quantization_config needs bits and group_size as integers; fetch the file again")
    rules = _stored_rules(quantization)
    check_patterns((rule.pattern for rule in rules), "dynamic")
    return GptqReader(quantization, version, rules)


def _stated_version(quantization: Mapping[str, Any]) -> object:
    return quantization.get("checkpoint_format") or quantization.get("format") or "gptq"


def _stored_rules(quantization: Mapping[str, Any]) -> tuple[Rule, ...]:
    try:
        return stored_rules(quantization.get("dynamic"))
    except ConfigError as error:
        raise CheckpointError(f"config.json: quantization_config cannot be read: {error}") from None


def _decode_zeros(stored: np.ndarray, bits: int, version: int) -> np.ndarray | None:
    """Zero points as a `PackedTensor` keeps them: plain, and None where all are 2^(bits-1)."""
    middle = 2 ** (bits - 1) - (version == 1)
    if np.array_equal(stored, constant_words(middle, bits, (stored.shape[0], stored.shape[1] * 32 // bits))):
        return None
    if version == 2:
        return stored
    zero_gn = unpack_codes(jnp.asarray(np.ascontiguousarray(stored.T)), bits).T
    return np.asarray(pack_codes(((zero_gn + 1) % 2**bits).T, bits).T)


def _stored_settings(config: SolverConfig) -> dict[str, Any]:
    """The settings that readers must know of."""
    return {name: getattr(config, name) for name in STORED_OPTIONS}


def _refusals(config: SolverConfig) -> list[str]:
    """Sentences on who refuses linears of these settings."""
    sentences = []
    if not config.sym:
        sentences.append("vLLM refuses asymmetric GPTQ files; GPTQModel loads them (as v2)")
    if config.bits in (2, 3):
        sentences.append(f"vLLM refuses {config.bits}-bit GPTQ files; GPTQModel loads them")
    if config.group_size not in VLLM_GROUPS:
        sentences.append(f"vLLM serves groups of {VLLM_GROUPS}, not {config.group_size}")
    if config.group_size not in GPTQMODEL_GROUPS:
        sentences.append(
            f"GPTQModel loads groups of {GPTQMODEL_GROUPS}, not {config.group_size}, and transformers loads through it"
        )
    return sentences


def _is_gptq(quantization: Mapping[str, Any]) -> bool:
    return quantization.get("quant_method") == "gptq"


V1 = Format(
    name="gptq",
    detects=lambda quantization: _is_gptq(quantization) and _stated_version(quantization) != "gptq_v2",
    reader=functools.partial(_reader, 1),
    writer=GptqWriter(version=1),
)
V2 = Format(name="gptq_v2", detects=_is_gptq, reader=functools.partial(_reader, 2), writer=GptqWriter(version=2))
