"""Quantized folders as other programs write them, and in float64 what they must expand to: written from the descriptions of the
formats, one code at a time, so that nothing is shared with the code that reads them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import tiny

from converters.checkpoint import SINGLE
from converters.output.describe import kernels_of
from jgptq.models import Decoder
from jgptq.models.packed import PackedTensor

AWQ_COLUMNS = [0, 2, 4, 6, 1, 3, 5, 7]  # the column that each nibble of a word holds, least significant first


def draw(seed: int, shape: tuple[int, int], rows: int, bits: int, sym: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random codes `[K, N]`, float16 scales `[G, N]` and zero points `[G, N]`."""
    random, (k, n) = np.random.default_rng(seed), shape
    codes = random.integers(0, 2**bits, (k, n))
    scales = random.uniform(0.01, 0.05, (k // rows, n)).astype(np.float16)
    zeros = np.full((k // rows, n), 2 ** (bits - 1)) if sym else random.integers(0, 2**bits, (k // rows, n))
    return codes, scales, zeros


def words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packs the last axis of a matrix into int32, least significant first."""
    per_word = 32 // bits
    packed = np.zeros((codes.shape[0], codes.shape[1] // per_word), np.uint32)
    for column in range(codes.shape[1]):
        packed[:, column // per_word] |= codes[:, column].astype(np.uint32) << np.uint32(bits * (column % per_word))
    return packed.view(np.int32)


def awq_words(codes: np.ndarray) -> np.ndarray:
    """Packs the last axis of a matrix of 4-bit codes in AWQ's order."""
    packed = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for word in range(packed.shape[1]):
        for nibble, column in enumerate(AWQ_COLUMNS):
            packed[:, word] |= codes[:, 8 * word + column].astype(np.uint32) << np.uint32(4 * nibble)
    return packed.view(np.int32)


def linear_names(folder: Path) -> dict[str, tuple[int, int]]:
    """The linears of the blocks of a float folder, with (K, N)."""
    tensors = safetensors.numpy.load_file(folder / SINGLE)
    return {
        name.removesuffix(".weight"): array.shape[::-1]
        for name, array in tensors.items()
        if ".layers." in name and array.ndim == 2
    }


def replace_linears(folder: Path, packed: dict[str, dict[str, np.ndarray]], quantization: dict[str, Any]) -> Path:
    """Puts packed parts in the place of linears, and a `quantization_config` into config.json."""
    tensors = safetensors.numpy.load_file(folder / SINGLE)
    for name, parts in packed.items():
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{part}": np.ascontiguousarray(array) for part, array in parts.items()}
    safetensors.numpy.save_file(tensors, folder / SINGLE)
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def awq_folder(path: Path, *, keep: str = "o_proj", **changes: Any) -> tuple[Path, dict[str, np.ndarray]]:
    """An AWQ folder of version gemm with groups of 32, and the weights `[K, N]` of its packed linears."""
    folder, packed, weights = tiny.folder(path), {}, {}
    for seed, (name, shape) in enumerate(linear_names(folder).items()):
        if keep in name:
            continue
        codes, scales, zeros = draw(seed, shape, 32, 4, sym=False)
        packed[name] = {"qweight": awq_words(codes), "qzeros": awq_words(zeros), "scales": scales}
        weights[name] = np.repeat(scales.astype(np.float64), 32, axis=0) * (codes - np.repeat(zeros, 32, axis=0))
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    return replace_linears(folder, packed, config | {"modules_to_not_convert": [keep]} | changes), weights


def compressed_parts(
    seed: int, shape: tuple[int, int], *, bits: int, group_size: int, sym: bool, reordered: bool = False
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The parts of one compressed-tensors linear, and its weights `[K, N]`."""
    (k, n), rows = shape, shape[0] if group_size == -1 else group_size
    codes, scales, zeros = draw(seed, shape, rows, bits, sym)
    group = np.arange(k) // rows
    if reordered:
        group = np.random.default_rng(seed).permutation(group)
    parts = {
        "weight_packed": words(codes.T, bits),
        "weight_scale": scales.T,
        "weight_shape": np.array([n, k], np.int64),
    }
    parts |= {} if sym else {"weight_zero_point": words(zeros, bits).T}
    parts |= {"weight_g_idx": group.astype(np.int32)} if reordered else {}
    return parts, scales.astype(np.float64)[group] * (codes - zeros[group])


def group(targets: list[str], **weights: Any) -> dict[str, Any]:
    """An entry of `config_groups`."""
    stated = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False}
    return {"targets": targets, "weights": stated | weights, "input_activations": None, "output_activations": None}


def compressed_config(groups: dict[str, dict], ignore: list[str] | None = None) -> dict[str, Any]:
    """A `quantization_config` as llm-compressor writes it."""
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head"] if ignore is None else ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def packed_kernels(params: Decoder) -> dict[str, PackedTensor]:
    return {f"model.{path}": kernel for path, kernel in kernels_of(params) if isinstance(kernel, PackedTensor)}


def assert_expands_to(params: Decoder, weights: dict[str, np.ndarray]) -> None:
    """A float16 scale times a code is exact in float32, so that both must agree in every bit."""
    kernels = packed_kernels(params)
    assert sorted(kernels) == sorted(weights)
    for name, weight in weights.items():
        np.testing.assert_array_equal(np.asarray(kernels[name].dequantize(), np.float64), weight, err_msg=name)
