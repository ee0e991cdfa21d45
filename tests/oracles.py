"""Textbook versions in numpy float64, written for clarity: what every numeric room is held against."""

import numpy as np


def minmax_grid(w_rn: np.ndarray, bits: int, sym: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of each column of one group; scales rounded to float16 as files hold them."""
    top = 2**bits - 1
    if sym:
        scale = 2 * np.abs(w_rn).max(0) / top
        zero = np.full_like(scale, 2 ** (bits - 1))
    else:
        low, high = np.minimum(w_rn.min(0), 0), np.maximum(w_rn.max(0), 0)
        scale = (high - low) / top
    scale = np.where(scale > 0, scale, 1.0).astype(np.float16).astype(np.float64)
    if not sym:
        zero = np.clip(np.rint(-low / scale), 0, top)
    return scale, zero


def round_to_nearest(w_kn: np.ndarray, bits: int, rows: int, sym: bool) -> np.ndarray:
    """Every weight to the nearest point of its group's grid."""
    out = np.empty_like(w_kn, dtype=np.float64)
    for start in range(0, len(w_kn), rows):
        part = w_kn[start : start + rows]
        scale, zero = minmax_grid(part, bits, sym)
        out[start : start + rows] = scale * (np.clip(np.rint(part / scale) + zero, 0, 2**bits - 1) - zero)
    return out


def obq_fixed_order(w_kn: np.ndarray, h_kk: np.ndarray, bits: int, rows: int, sym: bool, damping: float) -> np.ndarray:
    """Optimal Brain Quantization (arXiv 2208.11580) in the order of the rows: one weight at a time, with an explicit inverse.

    After row k is quantized with error e, every later row moves by `-e Hinv[k, j] / Hinv[k, k]`, and row and column k are
    eliminated from the inverse (equation 3). The grid of a group is set when its first row's turn comes.
    """
    w = w_kn.astype(np.float64).copy()
    h = h_kk + damping * np.mean(np.diag(h_kk)) * np.eye(len(h_kk))
    inverse = np.linalg.inv(h.astype(np.float64))
    out = np.empty_like(w)
    scale = zero = np.zeros(w.shape[1])
    for k in range(len(w)):
        if k % rows == 0:
            scale, zero = minmax_grid(w[k : k + rows], bits, sym)
        out[k] = scale * (np.clip(np.rint(w[k] / scale) + zero, 0, 2**bits - 1) - zero)
        error = w[k] - out[k]
        w[k:] -= np.outer(inverse[k:, k], error) / inverse[k, k]
        inverse = inverse - np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    return out


def output_loss(dw_kn: np.ndarray, h_kk: np.ndarray) -> float:
    """tr(dW^T H dW)."""
    return float(np.trace(dw_kn.T @ h_kk @ dw_kn))
