"""One leaf of a decoder -> the tensors that a file holds for it."""

import numpy as np

from converters.names import NameRule
from converters.shards import TensorSpec
from jgptq.errors import ConfigError
from jgptq.models.packed import PackedTensor
from jgptq.notation import Array
from jgptq.settings.sizes import group_rows

_INT32, _FLOAT16 = np.dtype(np.int32), np.dtype(np.float16)


def float_specs(name: str, rule: NameRule, shape: tuple[int, ...], dtype: np.dtype) -> list[TensorSpec]:
    """The plan for a float leaf of this shape in Flax."""
    return [TensorSpec(f"{name}.{rule.suffix}", np.dtype(dtype), tuple(shape[::-1] if rule.transposed else shape))]


def packed_specs(
    name: str, shape: tuple[int, int], bits: int, group_size: int, scale_dtype: np.dtype = _FLOAT16
) -> list[TensorSpec]:
    """The plan for a packed kernel `[K, N]` in the GPTQ formats."""
    k, n = shape
    groups = -(-k // group_rows(k, group_size))
    return [
        TensorSpec(f"{name}.qweight", _INT32, (k * bits // 32, n)),
        TensorSpec(f"{name}.qzeros", _INT32, (groups, n * bits // 32)),
        TensorSpec(f"{name}.scales", scale_dtype, (groups, n)),
        TensorSpec(f"{name}.g_idx", _INT32, (k,)),
    ]


def encode_float(name: str, rule: NameRule, leaf: Array | PackedTensor, dtype: np.dtype | None = None) -> dict[str, np.ndarray]:
    """The tensor of a float leaf; a packed kernel is expanded and rounded to `dtype`."""
    array = np.asarray(leaf.dequantize() if isinstance(leaf, PackedTensor) else leaf)
    if dtype is not None:
        array = array.astype(dtype)
    return {f"{name}.{rule.suffix}": array.T if rule.transposed else array}


def encode_packed(name: str, packed: PackedTensor, file_format: str) -> dict[str, np.ndarray]:
    """The tensors of a packed kernel.

    Args:
      name: Hugging Face name of the linear.
      packed: the kernel.
      file_format: "gptq" (v1, stores zero - 1) or "gptq_v2" (stores zero).

    Raises:
      ConfigError: an asymmetric kernel in v1, which cannot hold a zero point of 0.
    """
    k, _ = packed.shape
    rows = group_rows(k, packed.group_size)
    if file_format == "gptq" and packed.zeros is not None:
        raise ConfigError(f"{name}: GPTQ v1 cannot hold the zero points of an asymmetric grid; use format 'gptq_v2'")
    zeros = packed.zeros
    if zeros is None:
        middle = 2 ** (packed.bits - 1)
        zeros = constant_words(middle - 1 if file_format == "gptq" else middle, packed.bits, packed.scales.shape)
    group_index = np.arange(k, dtype=np.int32) // rows if packed.group_index is None else packed.group_index
    return {
        f"{name}.qweight": np.asarray(packed.qweight),
        f"{name}.qzeros": np.asarray(zeros),
        f"{name}.scales": np.asarray(packed.scales),
        f"{name}.g_idx": np.asarray(group_index),
    }


def constant_words(code: int, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """The words `[G, N*bits/32]` of a matrix `[G, N]` of one code, packed along N."""
    stream = sum(code << bits * j for j in range(32))
    words = np.frombuffer(stream.to_bytes(4 * bits, "little"), np.int32)
    return np.tile(words, (shape[0], shape[1] // 32))
