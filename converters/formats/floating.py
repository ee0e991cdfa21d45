"""Float files: packed kernels are expanded to `scale * (code - zero)` and rounded once to the dtype of the file."""

import dataclasses
from typing import ClassVar

import numpy as np

from converters.formats.base import Format, Layout, Written
from converters.output.shards import TensorSpec
from jgptq.models import ModelConfig
from jgptq.models.packed import PackedTensor
from jgptq.settings.run import QuantizeConfig
from jgptq.settings.solver import SolverConfig


@dataclasses.dataclass(frozen=True)
class FloatWriter:
    """Writes the expanded kernel as `weight`, in the layout of the family's float files."""

    packs: ClassVar[bool] = False
    scales: ClassVar[str] = ""
    config_file: ClassVar[str | None] = None
    serving: ClassVar[str] = ""

    def refusal(self, settings: SolverConfig) -> str | None:
        """None: a float holds the weights of any grid, up to the rounding of its dtype."""

    def warnings(self, config: QuantizeConfig, model: ModelConfig, reordered: bool = False) -> list[str]:
        """`converters.formats.base.Writer.warnings`: every program reads float files."""
        return []

    def specs(self, name: str, layout: Layout) -> list[TensorSpec]:
        """`converters.formats.base.Writer.specs`."""
        shape = layout.shape[::-1] if layout.transposed else layout.shape
        return [TensorSpec(f"{name}.weight", layout.float_dtype, shape)]

    def encode(self, name: str, packed: PackedTensor, layout: Layout) -> dict[str, np.ndarray]:
        """`converters.formats.base.Writer.encode`."""
        weight_kn = np.asarray(packed.dequantize()).astype(layout.float_dtype)
        return {f"{name}.weight": weight_kn.T if layout.transposed else weight_kn}

    def quantization_config(self, written: Written) -> None:
        """None: nothing is packed."""


FLOAT = Format(name="float", writer=FloatWriter())
