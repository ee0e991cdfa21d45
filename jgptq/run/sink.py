"""Where finished blocks go: what the driver asks of a sink, and the one that keeps blocks in host memory."""

from collections.abc import Mapping
from typing import Protocol

import jax
import numpy as np

from jgptq.models import Unit
from jgptq.run.report import ReportRows


class Sink(Protocol):
    """Where finished blocks go, and where a repeated run finds them. The head, where it is quantized, follows the last block."""

    def done(self) -> Mapping[int, tuple[Unit, ReportRows]]:
        """The blocks that are already there, with their report rows."""
        ...

    def write(self, index: int, block: Unit, rows: ReportRows) -> None:
        """Takes a finished block."""
        ...


class MemorySink:
    """Keeps finished blocks in host memory."""

    def __init__(self) -> None:
        self._blocks: dict[int, tuple[Unit, ReportRows]] = {}

    def done(self) -> Mapping[int, tuple[Unit, ReportRows]]:
        """The blocks written so far."""
        return self._blocks

    def write(self, index: int, block: Unit, rows: ReportRows) -> None:
        """Keeps a block, its leaves moved to host memory."""
        self._blocks[index] = (jax.tree.map(np.asarray, block), rows)
