"""AWQ files of version `gemm`, as AutoAWQ writes them; they are only read.

A linear is `qweight` int32 `[K, N/8]`, `qzeros` int32 `[G, N/8]` and `scales` `[G, N]`, 4 bits. Nibble i of a word, counted from
the least significant, holds column `ORDER[i]` of the word's eight columns.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from converters.formats.base import Format
from converters.formats.settings import recorded
from jgptq.errors import ArchitectureError, CheckpointError, ConfigError
from jgptq.models.packed import PackedTensor
from jgptq.settings.rule import Rule
from jgptq.settings.run import QuantizeConfig
from jgptq.settings.sizes import group_rows

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column that each nibble of a word holds."""
BITS = 4


@dataclasses.dataclass(frozen=True)
class AwqReader:
    """Decodes linears into words along K: unlike those of the other formats, they are copies and no views of the file."""

    group_size: int
    skipped: tuple[str, ...]
    required: ClassVar[tuple[str, ...]] = ("qweight", "scales", "qzeros")
    optional: ClassVar[tuple[str, ...]] = ()

    @property
    def settings(self) -> QuantizeConfig:
        """The grid, the linears that are float as rules, and else the settings of plain GPTQ."""
        rules = tuple(
            Rule(pattern=f".*{re.escape(name)}", skip=True) for name in dict.fromkeys(self.skipped) if name != "lm_head"
        )
        try:
            return QuantizeConfig(bits=BITS, group_size=self.group_size, sym=False, **recorded({}), rules=rules)
        except ConfigError as error:
            raise CheckpointError(f"config.json: quantization_config cannot be read: {error}") from None

    def decode(self, name: str, shape: tuple[int, int], parts: Mapping[str, np.ndarray]) -> PackedTensor:
        """`converters.formats.base.Reader.decode`."""
        k, n = shape
        groups = -(-k // group_rows(k, self.group_size))
        expected = {"qweight": (k, n // 8), "qzeros": (groups, n // 8), "scales": (groups, n)}
        wrong = [
            f"{part} {list(parts[part].shape)}, expected {list(size)}"
            for part, size in expected.items()
            if parts[part].shape != size
        ]
        if wrong:
            raise CheckpointError(f"{name}: {'; '.join(wrong)}, for K={k}, N={n} and groups of {self.group_size}")
        zero_gn = unpack_nibbles(parts["qzeros"])
        symmetric = bool(np.all(zero_gn == 2 ** (BITS - 1)))
        return PackedTensor(
            qweight=_packed(unpack_nibbles(parts["qweight"])),
            scales=parts["scales"],
            zeros=None if symmetric else _packed(zero_gn.T).T,
            bits=BITS,
            group_size=self.group_size,
            shape=shape,
        )


def _packed(codes: np.ndarray) -> np.ndarray:
    """`pallas_kernels.packing.pack_codes` for 4 bits, in numpy: nothing is compiled for the many shapes of a checkpoint."""
    shifts = BITS * np.arange(8, dtype=np.uint32)[:, None]
    nibbles = codes.reshape(-1, 8, codes.shape[1]).astype(np.uint32) << shifts
    return np.bitwise_or.reduce(nibbles, axis=1).view(np.int32)


def unpack_nibbles(words: np.ndarray) -> np.ndarray:
    """The codes `[R, N]`, uint8, of words `[R, N/8]`."""
    shifts = np.zeros(8, np.uint32)
    shifts[list(ORDER)] = 4 * np.arange(8, dtype=np.uint32)
    nibbles = np.ascontiguousarray(words).view(np.uint32)[:, :, None] >> shifts & np.uint32(0xF)
    return nibbles.astype(np.uint8).reshape(words.shape[0], -1)


def _reader(quantization: Mapping[str, Any]) -> AwqReader:
    """The reader, once the variant has been checked."""
    group_size = quantization.get("group_size", quantization.get("q_group_size"))
    skipped = quantization.get("modules_to_not_convert") or []
    wanted: dict[str, tuple[object, tuple[object, ...]]] = {
        "version": (str(quantization.get("version") or quantization.get("format") or "gemm").lower(), ("gemm",)),
        "bits": (quantization.get("bits", quantization.get("w_bit", BITS)), (BITS,)),
        "zero_point": (quantization.get("zero_point", True), (True,)),
        "backend": (quantization.get("backend", "autoawq"), ("autoawq", "auto", None)),
    }
    problems = [
        f"{key} is {value!r}, expected {allowed[0]!r}" for key, (value, allowed) in wanted.items() if value not in allowed
    ]
    if problems:
        raise ArchitectureError(f"config.json: this variant of AWQ cannot be read: {'; '.join(problems)}")
    if not isinstance(group_size, int) or not isinstance(skipped, list) or not all(isinstance(name, str) for name in skipped):
        raise CheckpointError(
            "config.json: quantization_config needs group_size as an integer and modules_to_not_convert as a list of names"
        )
    return AwqReader(group_size, tuple(skipped))


AWQ = Format(name="awq", detects=lambda quantization: quantization.get("quant_method") == "awq", reader=_reader)
