"""The leaves of a decoder -> the tensors that a file holds for them: planned from shapes first, then made."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from converters.formats import Layout, Writer
from converters.names import stored_rule
from converters.output.shards import TensorSpec
from jgptq.models import checkpoint_name
from jgptq.models.packed import PackedTensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoding:
    """How the leaves of one decoder are written. Planning and making read the same layouts, so that they agree."""

    writer: Writer
    layouts: Mapping[str, Layout]  # of each kernel that is packed, by the path of its linear
    model_type: str  # the family, which names the tensors
    dtype: np.dtype | None = None  # of all other leaves; None keeps that of each

    def specs(self, path: str, attribute: str, leaf: Any) -> list[TensorSpec]:
        """The tensors that a leaf will be.

        Args:
          path: of its module in the decoder.
          attribute: its name in the module.
          leaf: of that shape in Flax; for a kernel that will be packed, the float one will do.
        """
        name = checkpoint_name(path, self.model_type)
        if attribute == "kernel" and path in self.layouts:
            return self.writer.specs(name, self.layouts[path])
        rule = stored_rule(path, attribute, self.model_type)
        stored = leaf.shape[::-1] if rule.transposed else leaf.shape
        return [TensorSpec(f"{name}.{rule.suffix}", np.dtype(leaf.dtype if self.dtype is None else self.dtype), tuple(stored))]

    def tensors(self, path: str, attribute: str, leaf: Any) -> dict[str, np.ndarray]:
        """The tensors of a leaf, as `specs` planned them."""
        name = checkpoint_name(path, self.model_type)
        if isinstance(leaf, PackedTensor):
            return self.writer.encode(name, leaf, self.layouts[path])
        rule = stored_rule(path, attribute, self.model_type)
        array = np.asarray(leaf) if self.dtype is None else np.asarray(leaf).astype(self.dtype)
        return {f"{name}.{rule.suffix}": array.T if rule.transposed else array}
