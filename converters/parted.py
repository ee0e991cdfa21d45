"""Quantized files of programs that part linears which the family's own files hold fused."""

import dataclasses

import numpy as np

from converters.checkpoint import Checkpoint
from jgptq.errors import CheckpointError

_FUSED, _PARTS = ".mlp.gate_up_proj.", (".mlp.gate_proj.", ".mlp.up_proj.")
_COLUMNS = ("qweight", "qzeros", "scales")


class JoinedCheckpoint(Checkpoint):
    """A checkpoint some of whose tensors are two that lie side by side, gate and up; they are read when they are asked for.

    Args:
      checkpoint: the tensors as the files have them.
      joined: name of a joined tensor -> names of its two parts.
    """

    def __init__(self, checkpoint: Checkpoint, joined: dict[str, tuple[str, str]]):
        entries = dict(checkpoint.entries)
        for name, (gate, up) in joined.items():
            first, second = entries.pop(gate), entries.pop(up)
            width = 0 if name.endswith(".g_idx") else second.shape[-1]
            entries[name] = dataclasses.replace(first, shape=(*first.shape[:-1], first.shape[-1] + width), strides=None)
        super().__init__(checkpoint.folder, entries)
        self._apart, self._joined = checkpoint, joined

    def array(self, name: str) -> np.ndarray:
        """A view of a tensor, or a copy of one that is joined.

        Raises:
          CheckpointError: the two parts do not fit each other.
        """
        if name not in self._joined:
            return self._apart.array(name)
        gate, up = (self._apart.array(part) for part in self._joined[name])
        if (gate.shape, gate.dtype) != (up.shape, up.dtype) or (name.endswith(".g_idx") and not np.array_equal(gate, up)):
            parts = " and ".join(self._joined[name])
            raise CheckpointError(
                f"{self.folder}: {parts} differ in bits, groups or order; they are read as {name}, which needs the same of both"
            )
        return gate if name.endswith(".g_idx") else np.concatenate([gate, up], axis=-1)


def with_gate_and_up_joined(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with `gate_proj` and `up_proj`, which GPTQModel makes of a Phi-3 or GLM-4, read as `gate_up_proj`.

    Codes, scales and zero points of a fused linear are those of its parts side by side: in the GPTQ formats, columns do not share
    words of codes, and 32 columns fill whole words of zero points.
    """
    joined: dict[str, tuple[str, str]] = {}
    for name in checkpoint.entries:
        before, apart, part = name.partition(_PARTS[0])
        other = f"{before}{_PARTS[1]}{part}"
        whole = other in checkpoint.entries and checkpoint.entries[name].shape and checkpoint.entries[other].shape
        if apart and part in (*_COLUMNS, "g_idx") and whole:
            joined[f"{before}{_FUSED}{part}"] = (name, other)
    return JoinedCheckpoint(checkpoint, joined) if joined else checkpoint
