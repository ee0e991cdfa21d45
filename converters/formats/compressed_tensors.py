"""compressed-tensors files of format `pack-quantized`: codes of 4 or 8 bits, groups or whole columns.

A linear is `weight_packed` int32 `[N, K*bits/32]`, `weight_scale` `[N, G]` and `weight_shape` int64 `[2]` = (N, K). An asymmetric
one has `weight_zero_point` int32 `[N*bits/32, G]` as well, and one whose rows of K are not in the order of their groups
`weight_g_idx` int32 `[K]`. Codes and zero points are signed, and stored plus 2^(bits-1), which is what a `PackedTensor` holds:
the words are those of GPTQ v2, transposed.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from converters.formats.base import INT32, Format, Layout, Written
from converters.formats.gptq import stored_groups
from converters.formats.schemes import Scheme, Schemes, read_schemes
from converters.formats.settings import HEAD, meta_of, own_settings, patterns, recorded, settings_from, used_settings
from converters.formats.words import constant_words
from converters.output.shards import TensorSpec
from jgptq.errors import CheckpointError, ConfigError
from jgptq.models import ModelConfig, checkpoint_name
from jgptq.models.packed import PackedTensor
from jgptq.settings.run import QuantizeConfig
from jgptq.settings.sizes import group_rows
from jgptq.settings.solver import SolverConfig

BITS = (4, 8)
"""Widths that are read and written: versions of the compressed-tensors package disagree on how others are packed."""
SERVING = """- vLLM: `vllm serve FOLDER`.
- transformers, with the package compressed-tensors: `AutoModelForCausalLM.from_pretrained(FOLDER)`.
- JAX: `converters.load_hf(FOLDER)`."""
_INT64 = np.dtype(np.int64)


@dataclasses.dataclass(frozen=True)
class CompressedReader:
    """Decodes linears by the schemes of the config's `config_groups`."""

    quantization: Mapping[str, Any]
    schemes: Schemes
    required: ClassVar[tuple[str, ...]] = ("weight_packed", "weight_scale", "weight_shape")
    optional: ClassVar[tuple[str, ...]] = ("weight_zero_point", "weight_g_idx")

    @property
    def settings(self) -> QuantizeConfig:
        """The run's own settings where `meta` records them, else those of the schemes: one is the run's, the others are rules."""
        meta = self.quantization.get("meta") or {}
        if "rules" in meta:
            return settings_from(meta)
        base = self.schemes.base
        try:
            return QuantizeConfig(
                bits=base.bits,
                group_size=base.group_size,
                sym=base.sym,
                **recorded({}),
                rules=self.schemes.rules(),
                lm_head=self.schemes.of(HEAD) is not None,
            )
        except ConfigError as error:
            raise CheckpointError(f"config.json: quantization_config cannot be read: {error}") from None

    def decode(self, name: str, shape: tuple[int, int], parts: Mapping[str, np.ndarray]) -> PackedTensor:
        """`converters.formats.base.Reader.decode`."""
        k, n = shape
        scheme = self.schemes.of(name)
        if scheme is None:
            raise CheckpointError(f"{name}: packed, but no target of config_groups in config.json matches it, or ignore does")
        if parts["weight_shape"].tolist() != [n, k]:
            raise CheckpointError(f"{name}.weight_shape is {parts['weight_shape'].tolist()}, expected [{n}, {k}]")
        if any(parts[part].ndim != 2 for part in ("weight_packed", "weight_scale")):
            raise CheckpointError(f"{name}: weight_packed and weight_scale must be matrices")
        zeros = parts.get("weight_zero_point")
        if scheme.sym != (zeros is None):
            what = "symmetric, but weight_zero_point is there" if scheme.sym else "asymmetric, but weight_zero_point is missing"
            raise CheckpointError(f"{name}: its scheme in config.json is {what}")
        rows, order = group_rows(k, scheme.group_size), parts.get("weight_g_idx")
        if order is not None and np.all(order == -1):  # how the compressed-tensors package marks that there is none
            order = None
        return PackedTensor(
            qweight=parts["weight_packed"].T,
            scales=parts["weight_scale"].T,
            zeros=None if zeros is None else _unless_constant(zeros.T, scheme.bits, n),
            group_index=stored_groups(f"{name}.weight_g_idx", order, k, rows, -(-k // rows)),
            bits=scheme.bits,
            group_size=scheme.group_size,
            shape=shape,
        )


@dataclasses.dataclass(frozen=True)
class CompressedWriter:
    """Encodes linears as `pack-quantized`."""

    packs: ClassVar[bool] = True
    scales: ClassVar[str] = "weight_scale"
    config_file: ClassVar[str | None] = None
    serving: ClassVar[str] = SERVING

    def refusal(self, settings: SolverConfig) -> str | None:
        """`converters.formats.base.Writer.refusal`."""
        if settings.bits in BITS:
            return None
        return f"format 'compressed-tensors' is written with {BITS} bits, not {settings.bits}; use 'gptq' or 'gptq_v2'"

    def warnings(self, config: QuantizeConfig, model: ModelConfig, reordered: bool = False) -> list[str]:
        """`converters.formats.base.Writer.warnings`."""
        served = (-1, 32, 64, 128)
        sentences = [
            f"vLLM serves compressed-tensors groups of {served}, not {used.group_size}"
            for used in used_settings(config)
            if used.group_size not in served
        ]
        if not all(used.sym for used in used_settings(config)):
            sentences.append(
                "transformers (5.24 with compressed-tensors 0.20) loads asymmetric files only where all linears have the same "
                "settings, and with quantization_config=CompressedTensorsConfig(dequantize=True); vLLM loads them"
            )
        if reordered:
            sentences.append(
                "compressed-tensors from 0.20 on refuses actorder 'group', which order 'desc_act' needs; orders 'static' and "
                "'group' need none"
            )
        return list(dict.fromkeys(sentences))

    def specs(self, name: str, layout: Layout) -> list[TensorSpec]:
        """`converters.formats.base.Writer.specs`."""
        (k, n), bits = layout.shape, layout.bits
        if k % group_rows(k, layout.group_size):
            raise ConfigError(
                f"{name}: compressed-tensors needs a group size that divides K={k}, found {layout.group_size}; use 'gptq_v2'"
            )
        specs = [
            TensorSpec(f"{name}.weight_packed", INT32, (n, k * bits // 32)),
            TensorSpec(f"{name}.weight_scale", layout.scale_dtype, (n, layout.groups)),
            TensorSpec(f"{name}.weight_shape", _INT64, (2,)),
        ]
        if not layout.sym:
            specs.append(TensorSpec(f"{name}.weight_zero_point", INT32, (n * bits // 32, layout.groups)))
        if layout.reordered:
            specs.append(TensorSpec(f"{name}.weight_g_idx", INT32, (k,)))
        return specs

    def encode(self, name: str, packed: PackedTensor, layout: Layout) -> dict[str, np.ndarray]:
        """`converters.formats.base.Writer.encode`."""
        k, n = packed.shape
        tensors = {
            f"{name}.weight_packed": np.asarray(packed.qweight).T,
            f"{name}.weight_scale": np.asarray(packed.scales).T,
            f"{name}.weight_shape": np.array([n, k], np.int64),
        }
        if not layout.sym:
            zeros = packed.zeros
            if zeros is None:
                zeros = constant_words(2 ** (packed.bits - 1), packed.bits, packed.scales.shape)
            tensors[f"{name}.weight_zero_point"] = np.asarray(zeros).T
        if layout.reordered:
            contiguous = np.arange(k, dtype=np.int32) // group_rows(k, packed.group_size)
            tensors[f"{name}.weight_g_idx"] = contiguous if packed.group_index is None else np.asarray(packed.group_index)
        return tensors

    def quantization_config(self, written: Written) -> dict[str, Any]:
        """The `quantization_config` object, as compressed-tensors, transformers and vLLM read it.

        Where all packed linears have the same settings, they are the target `Linear`. Where they differ, every group has regexes
        for full names, and no target is a class: vLLM tries the class of a fused linear before the names of its parts.
        """
        schemes = {_scheme(path, used, written) for path, used in written.linears.items() if used is not None}
        targets = {scheme: ["Linear"] for scheme in schemes} if len(schemes) == 1 else _named(written)
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{number}": dataclasses.replace(scheme, targets=tuple(names)).to_json()
                for number, (scheme, names) in enumerate(targets.items())
            },
            "ignore": _ignored(written),
            "meta": meta_of(written.run) | own_settings(written.run),
        }


def _scheme(path: str, settings: SolverConfig, written: Written) -> Scheme:
    """The scheme of one linear, without targets."""
    return Scheme(
        bits=settings.bits, group_size=settings.group_size, sym=settings.sym, reordered=path in written.reordered, targets=()
    )


def _named(written: Written) -> dict[Scheme, list[str]]:
    """The schemes with regexes that match the full names of their linears and of no others."""
    schemes: dict[Scheme, list[str]] = {}

    def key(path: str, settings: SolverConfig | None) -> Scheme | None:
        return None if settings is None else _scheme(path, settings, written)

    for pattern, scheme in patterns(written.linears, written.model, key):
        if scheme is not None:
            schemes.setdefault(scheme, []).append(f"re:{pattern}")
    if (head := key(HEAD, written.linears.get(HEAD))) is not None:
        schemes.setdefault(head, []).append(HEAD)
    return schemes


def _ignored(written: Written) -> list[str]:
    """The names of all linears that are float: routers, the head, also a tied one, and projections around the blocks."""
    model = written.model
    paths = [path for path, settings in written.linears.items() if settings is None and path != HEAD]
    paths += ["project_in", "project_out"] if model.projects else []
    if model.experts is not None:
        routers = ("router", "shared_expert_gate") if model.experts.shared_gate else ("router",)
        paths += [f"layers.{i}.mlp.{part}" for i, sparse in enumerate(model.sparse_layers) if sparse for part in routers]
    names = [checkpoint_name(path, model.model_type) for path in paths]
    return names if written.linears.get(HEAD) is not None else [*names, HEAD]


def _unless_constant(zeros: np.ndarray, bits: int, n: int) -> np.ndarray | None:
    """Zero points `[G, N*bits/32]`, or None where all are 2^(bits-1)."""
    if zeros.ndim == 2 and np.array_equal(zeros, constant_words(2 ** (bits - 1), bits, (zeros.shape[0], n))):
        return None
    return zeros


def _reader(quantization: Mapping[str, Any]) -> CompressedReader:
    return CompressedReader(quantization, read_schemes(quantization, BITS))


COMPRESSED_TENSORS = Format(
    name="compressed-tensors",
    detects=lambda quantization: quantization.get("quant_method") == "compressed-tensors",
    reader=_reader,
    writer=CompressedWriter(),
)
