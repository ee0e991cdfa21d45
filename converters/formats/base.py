"""What a file format is: how a `quantization_config` is recognized, how one linear is decoded, and how one is encoded."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, Self

import numpy as np

from converters.output.shards import TensorSpec
from jgptq.models import ModelConfig
from jgptq.models.packed import PackedTensor
from jgptq.settings.run import QuantizeConfig
from jgptq.settings.sizes import group_rows
from jgptq.settings.solver import SolverConfig

INT32, FLOAT16 = np.dtype(np.int32), np.dtype(np.float16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """What a file holds of one packed linear, known from shapes and settings alone."""

    shape: tuple[int, int]  # (K, N)
    bits: int
    group_size: int  # rows in a group, or -1 for all
    sym: bool  # False: zero points are stored, even where they are those of a symmetric grid by chance
    reordered: bool  # whether the group of each row must be stored
    scale_dtype: np.dtype = FLOAT16
    float_dtype: np.dtype = FLOAT16  # of the weights where the format expands them
    transposed: bool = True  # whether expanded weights lie as [N, K]

    @classmethod
    def planned(cls, shape: tuple[int, int], settings: SolverConfig) -> Self:
        """The layout of a linear that will be quantized with these settings."""
        reordered = settings.order == "desc_act" and group_rows(shape[0], settings.group_size) < shape[0]
        return cls(shape=shape, bits=settings.bits, group_size=settings.group_size, sym=settings.sym, reordered=reordered)

    @classmethod
    def of(cls, kernel: PackedTensor, settings: SolverConfig, float_dtype: np.dtype, *, transposed: bool) -> Self:
        """The layout of a kernel: as it was planned with its settings, widened by what the kernel has besides."""
        planned = cls.planned(kernel.shape, settings)
        return dataclasses.replace(
            planned,
            sym=planned.sym and kernel.zeros is None,
            reordered=planned.reordered or kernel.group_index is not None,
            scale_dtype=np.dtype(kernel.scales.dtype),
            float_dtype=float_dtype,
            transposed=transposed,
        )

    @property
    def groups(self) -> int:
        """Number of groups of rows, the last one possibly shorter."""
        return -(-self.shape[0] // group_rows(self.shape[0], self.group_size))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
    """What a `quantization_config` is made from."""

    run: QuantizeConfig  # the run's settings
    linears: Mapping[str, SolverConfig | None]  # of each linear by its path in the decoder; None where it is float
    model: ModelConfig  # how many blocks there are, which linears readers fuse, and what they are called
    reordered: frozenset[str] = frozenset()  # the paths of linears that store the group of each row


class Reader(Protocol):
    """Decodes the packed linears of one checkpoint, whose `quantization_config` has been checked."""

    required: ClassVar[tuple[str, ...]]  # the parts of a packed linear; the first one says that a linear is packed
    optional: ClassVar[tuple[str, ...]]  # the parts that it may have

    @property
    def settings(self) -> QuantizeConfig:
        """The settings that the files were written under, as far as they are recorded.

        Raises:
          CheckpointError: settings that cannot be read.
        """

    def decode(self, name: str, shape: tuple[int, int], parts: Mapping[str, np.ndarray]) -> PackedTensor:
        """One packed kernel.

        Args:
          name: the linear's name in the files, for the settings that are its own and for errors.
          shape: (K, N) of the linear in the model.
          parts: the arrays by part, all required ones among them.

        Raises:
          CheckpointError: shapes or settings that contradict each other.
        """


class Writer(Protocol):
    """Encodes packed linears; what it cannot hold is refused before anything is computed."""

    packs: ClassVar[bool]  # whether codes are stored; False where kernels are expanded
    scales: ClassVar[str]  # the part that holds the scales, which tuning may move after the codes are written
    config_file: ClassVar[str | None]  # a second file that holds the `quantization_config`
    serving: ClassVar[str]  # which programs load the files and how, in Markdown, for the model card

    def refusal(self, settings: SolverConfig) -> str | None:
        """Why the format cannot hold a linear of these settings, and what to use instead; None where it can."""

    def warnings(self, config: QuantizeConfig, model: ModelConfig, reordered: bool = False) -> list[str]:
        """Sentences on which programs will refuse the files; empty where all load them.

        Args:
          config: the run's settings.
          model: the decoder's switches.
          reordered: whether a linear stores the group of each row.
        """

    def specs(self, name: str, layout: Layout) -> list[TensorSpec]:
        """The tensors of a linear, before anything is computed.

        Raises:
          ConfigError: a shape that the format cannot hold.
        """

    def encode(self, name: str, packed: PackedTensor, layout: Layout) -> dict[str, np.ndarray]:
        """The tensors of a linear, of the dtypes and shapes of `specs`."""

    def quantization_config(self, written: Written) -> dict[str, Any] | None:
        """The `quantization_config` of config.json; None where nothing is packed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """One row of the table of file formats."""

    name: str  # as `--format` and errors call it
    detects: Callable[[Mapping[str, Any]], bool] = lambda quantization: False
    """Whether a `quantization_config` is of this format, or of a variant that `reader` refuses by name."""
    reader: Callable[[Mapping[str, Any]], Reader] | None = None
    """Makes the reader for a `quantization_config`; raises ArchitectureError or CheckpointError for what it cannot read."""
    writer: Writer | None = None  # None for a format that is only read
