"""What the files of a folder hold, by the libraries of their formats; and what a decoder must hold for that."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from converters.checkpoint import INDEX, SINGLE
from converters.names import leaves, stored_rule
from jgptq.models import Decoder, checkpoint_name
from jgptq.models.packed import PackedTensor

Tensors = dict[str, torch.Tensor]


def stored(folder: Path) -> Tensors:
    """All tensors of a folder as safetensors and torch read them."""
    formats: tuple[tuple[str, str, Callable[[Path], Tensors]], ...] = (
        (SINGLE, INDEX, safetensors.torch.load_file),
        ("pytorch_model.bin", "pytorch_model.bin.index.json", lambda path: torch.load(path, weights_only=True)),
    )
    for single, index, read in formats:
        if (folder / index).exists():
            files = set(json.loads((folder / index).read_text())["weight_map"].values())
            return {name: tensor for file in files for name, tensor in read(folder / file).items()}
        if (folder / single).exists():
            return read(folder / single)
    raise AssertionError("a decoder was read from a folder without weights")


def differences(decoder: Decoder, tensors: Tensors, version: str) -> Iterator[str]:
    """The leaves of a decoder that are not what the tensors say, bit for bit.

    Args:
      decoder: what was read.
      tensors: what the folder holds.
      version: "gptq" or "gptq_v2", by which zero points are read.
    """
    for path, module, attribute in leaves(decoder):
        leaf, name = getattr(module, attribute).get_value(), checkpoint_name(path, decoder.config.model_type)
        if isinstance(leaf, PackedTensor):
            expected = dequantized(
                {part: tensors[f"{name}.{part}"] for part in _PARTS if f"{name}.{part}" in tensors}, leaf, version
            )
            if not np.array_equal(np.asarray(leaf.dequantize()), expected, equal_nan=True):
                yield f"{name}: weights are not what codes, scales and zero points say"
            continue
        rule = stored_rule(path, attribute, decoder.config.model_type)
        tensor = tensors[f"{name}.{rule.suffix}"]
        stored_leaf = np.asarray(leaf.T if rule.transposed else leaf)
        if str(tensor.dtype).removeprefix("torch.") != str(leaf.dtype) or tuple(tensor.shape) != stored_leaf.shape:
            yield f"{name}: {leaf.dtype} {stored_leaf.shape}, the file holds {tensor.dtype} {tuple(tensor.shape)}"
        elif np.ascontiguousarray(stored_leaf).tobytes() != tensor.contiguous().view(torch.uint8).numpy().tobytes():
            yield f"{name}: other bits than in the file"


_PARTS = ("qweight", "scales", "qzeros", "g_idx")


def dequantized(parts: Tensors, leaf: PackedTensor, version: str) -> np.ndarray:
    """The float32 `[K, N]` weights of a GPTQ linear, one code at a time out of a stream of bits."""
    codes_kn = unpacked(parts["qweight"].numpy(), leaf.bits)
    zeros_gn = unpacked(parts["qzeros"].numpy().T, leaf.bits).T
    if version == "gptq":
        zeros_gn = (zeros_gn + 1) % 2**leaf.bits
    k, groups = codes_kn.shape[0], zeros_gn.shape[0]
    rows = k if leaf.group_size == -1 else leaf.group_size
    group_k = parts["g_idx"].numpy() if "g_idx" in parts else np.arange(k) // rows
    assert groups == -(-k // rows)
    scales_gn = parts["scales"].float().numpy()
    with np.errstate(all="ignore"):
        return scales_gn[group_k] * (codes_kn - zeros_gn[group_k]).astype(np.float32)


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """int64 codes `[32 * rows / bits, columns]` of words whose bits are one stream down each column."""
    stream = (words.view(np.uint32)[:, None, :] >> np.arange(32, dtype=np.uint32)[None, :, None]) & 1
    grouped = stream.reshape(-1, bits, words.shape[1]).astype(np.int64)
    return (grouped << np.arange(bits)[None, :, None]).sum(axis=1)
