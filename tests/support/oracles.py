"""Textbook versions in numpy float64, written for clarity: what every numeric room is held against."""

from collections.abc import Iterable

import numpy as np

Grid = tuple[np.ndarray, np.ndarray]
"""Scale and zero point of each column, or of each weight."""


def minmax_grid(w_rn: np.ndarray, bits: int, sym: bool, part: float = 1.0) -> Grid:
    """Scale and zero point of each column of one group, over a part of the range that covers it; scales rounded to float16 as
    files hold them."""
    top = 2**bits - 1
    if sym:
        scale = 2 * np.abs(w_rn).max(0) * part / top
        zero = np.full_like(scale, 2 ** (bits - 1))
    else:
        low, high = np.minimum(w_rn.min(0), 0), np.maximum(w_rn.max(0), 0)
        scale = (high - low) * part / top
    scale = np.where(scale > 0, scale, 1.0).astype(np.float16).astype(np.float64)
    if not sym:
        zero = np.clip(np.rint(-low * part / scale), 0, top)
    return scale, zero


def nearest_codes(w: np.ndarray, grid: Grid, bits: int) -> np.ndarray:
    """The code of the nearest grid point."""
    return np.clip(np.rint(w / grid[0]) + grid[1], 0, 2**bits - 1)


def nearest(w: np.ndarray, grid: Grid, bits: int) -> np.ndarray:
    """The nearest grid point."""
    return grid[0] * (nearest_codes(w, grid, bits) - grid[1])


def grid_error(w_rn: np.ndarray, grid: Grid, bits: int, weight_r: np.ndarray | None) -> np.ndarray:
    """What a search of scales minimizes in each column: `|error|^2.4` (GPTQ's published code), or error^2 weighted by diag H."""
    off = np.abs(w_rn - nearest(w_rn, grid, bits))
    return (off**2.4).sum(0) if weight_r is None else (weight_r[:, None] * off**2).sum(0)


def searched_grid(w_rn: np.ndarray, bits: int, sym: bool, weight_r: np.ndarray | None) -> Grid:
    """The best part of the covering range, one column after the other: of 1, 0.95 .. 0.2, then of 0.0125 .. 0.0375 around it."""
    grids = []
    for w_r1 in w_rn.T[:, :, None]:

        def error(part: float, w_r1: np.ndarray = w_r1) -> float:
            return grid_error(w_r1, minmax_grid(w_r1, bits, sym, part), bits, weight_r)[0]

        coarse = min((1 - 0.05 * step for step in range(17)), key=error)
        fine = min((min(coarse + 0.0125 * step, 1.0) for step in (0, -3, -2, -1, 1, 2, 3)), key=error)
        grids.append(minmax_grid(w_r1, bits, sym, fine))
    return np.concatenate([scale for scale, _ in grids]), np.concatenate([zero for _, zero in grids])


def round_to_nearest(w_kn: np.ndarray, bits: int, rows: int, sym: bool) -> np.ndarray:
    """Every weight to the nearest point of its group's grid."""
    out = np.empty_like(w_kn, dtype=np.float64)
    for start in range(0, len(w_kn), rows):
        part = w_kn[start : start + rows]
        out[start : start + rows] = nearest(part, minmax_grid(part, bits, sym), bits)
    return out


def static_grids(w_kn: np.ndarray, bits: int, rows: int, sym: bool) -> Grid:
    """The scale and zero point of each weight, from the groups of the file as it is."""
    grids = [minmax_grid(w_kn[start : start + rows], bits, sym) for start in range(0, len(w_kn), rows)]
    return tuple(np.repeat(np.stack(part), rows, axis=0) for part in zip(*grids, strict=True))


def damped(h_kk: np.ndarray, damping: float) -> np.ndarray:
    """H with a fraction of the mean of its diagonal added to it."""
    return h_kk + damping * np.mean(np.diag(h_kk)) * np.eye(len(h_kk))


def obq_fixed_order(
    w_kn: np.ndarray, h_kk: np.ndarray, bits: int, rows: int, sym: bool, damping: float, fixed: Grid | None = None
) -> np.ndarray:
    """Optimal Brain Quantization (arXiv 2208.11580) in the order of the rows: one weight at a time, with an explicit inverse.

    After row k is quantized with error e, every later row moves by `-e Hinv[k, j] / Hinv[k, k]`, and row and column k are
    eliminated from the inverse (equation 3). The grid of a group is set when its first row's turn comes, unless the grid of each
    weight is fixed beforehand.
    """
    w = w_kn.astype(np.float64).copy()
    inverse = np.linalg.inv(damped(h_kk, damping).astype(np.float64))
    out = np.empty_like(w)
    for k in range(len(w)):
        if fixed is not None:
            grid = fixed[0][k], fixed[1][k]
        elif k % rows == 0:
            grid = minmax_grid(w[k : k + rows], bits, sym)
        out[k] = nearest(w[k], grid, bits)
        w[k:] = obs_update(w[k:], inverse[k:, k:], 0, out[k])
        inverse = eliminated(inverse, k)
    return out


def obs_update(w_kn: np.ndarray, inverse_kk: np.ndarray, q: int, value: np.ndarray | float) -> np.ndarray:
    """The Optimal Brain Surgeon (Hassibi and Stork 1993): all weights after weight q is set to a value, zero where it is pruned,
    `w - (w_q - value) Hinv[:, q] / Hinv[q, q]`."""
    return w_kn - np.outer(inverse_kk[:, q], w_kn[q] - value) / inverse_kk[q, q]


def eliminated(inverse_kk: np.ndarray, q: int) -> np.ndarray:
    """The inverse of H without row and column q, which are zeros in it (arXiv 2208.11580, lemma 1)."""
    return inverse_kk - np.outer(inverse_kk[:, q], inverse_kk[q]) / inverse_kk[q, q]


def obq_greedy(w_kn: np.ndarray, h_kk: np.ndarray, bits: int, grids: Grid, damping: float) -> np.ndarray:
    """Optimal Brain Quantization in its own order (arXiv 2208.11580, algorithm 3): of the weights that are left, the one whose
    rounding costs least, `error^2 / Hinv[q, q]`, goes next. Each column has an order of its own."""
    out = np.empty(w_kn.shape)
    for n in range(w_kn.shape[1]):
        w, inverse = w_kn[:, n : n + 1].astype(np.float64), np.linalg.inv(damped(h_kk, damping))
        left = list(range(len(w)))
        while left:
            rounded = nearest(w[:, 0], (grids[0][:, n], grids[1][:, n]), bits)
            q = min(left, key=lambda q: (w[q, 0] - rounded[q]) ** 2 / inverse[q, q])
            left.remove(q)
            out[q, n] = rounded[q]
            w, inverse = obs_update(w, inverse, q, rounded[q]), eliminated(inverse, q)
    return out


def gptaq(
    w_kn: np.ndarray, x_tk: np.ndarray, float_tk: np.ndarray, bits: int, rows: int, sym: bool, damping: float, alpha: float
) -> np.ndarray:
    """GPTAQ (arXiv 2504.02692, algorithm 1), one row at a time. A row moves each later row by its error, and by `P[k, j] w_k`,
    with `P = alpha strictly_upper(dX X^T U^T) U` and dX what the quantized inputs lack."""
    w, scale = w_kn.astype(np.float64).copy(), 2 / len(x_tk)
    u = np.linalg.cholesky(np.linalg.inv(damped(scale * x_tk.T @ x_tk, damping))).T
    p = alpha * np.triu(scale * (float_tk - x_tk).T @ x_tk @ u.T, 1) @ u
    out = np.empty_like(w)
    for k in range(len(w)):
        if k % rows == 0:
            grid = minmax_grid(w[k : k + rows], bits, sym)
        out[k] = nearest(w[k], grid, bits)
        error = (w[k] - out[k]) / u[k, k]
        for j in range(k + 1, len(w)):
            w[j] -= u[k, j] * error - p[k, j] * w[k]
    return out


def augmented(w_kn: np.ndarray, x_tk: np.ndarray, goal_tn: np.ndarray, damping: float) -> tuple[np.ndarray, np.ndarray]:
    """The matrix and right-hand side whose least squares are those of `||goal - x V||^2` and of the damping, which pulls V
    towards w: `lambda T / 2 ||V - w||^2` for a lambda on the scale of H."""
    root = np.sqrt(damping * np.mean(np.diag(x_tk.T @ x_tk)))
    return np.concatenate([x_tk, root * np.eye(len(w_kn))]), np.concatenate([goal_tn, root * w_kn])


def qronos(w_kn: np.ndarray, x_tk: np.ndarray, float_tk: np.ndarray, grids: Grid, bits: int, damping: float) -> np.ndarray:
    """Qronos (arXiv 2505.11695), by its definition: each code is the nearest to what makes up best for the error so far, with the
    rows after it held, and then the rows after it are set anew by least squares. The first is chosen without the damping.
    """
    a, goal = augmented(w_kn, x_tk, float_tk @ w_kn, damping)
    w, out = w_kn.astype(np.float64).copy(), np.empty(w_kn.shape)
    for k in range(len(w)):
        if k == 0:
            best = x_tk[:, 0] @ (float_tk @ w_kn - x_tk[:, 1:] @ w_kn[1:]) / (x_tk[:, 0] @ x_tk[:, 0])
        else:
            best = a[:, k] @ (goal - a[:, :k] @ out[:k] - a[:, k + 1 :] @ w[k + 1 :]) / (a[:, k] @ a[:, k])
        out[k] = nearest(best, (grids[0][k], grids[1][k]), bits)
        w[k + 1 :] = np.linalg.lstsq(a[:, k + 1 :], goal - a[:, : k + 1] @ out[: k + 1], rcond=None)[0]
    return out


def descended(
    codes_kn: np.ndarray, target_kn: np.ndarray, h_kk: np.ndarray, grids: Grid, bits: int, rows: slice = slice(None)
) -> np.ndarray:
    """One sweep of cyclic coordinate descent over the codes (QuantEase, arXiv 2309.01885, algorithm 1): each is set to the best
    there is with all others held."""
    codes, (scale, zero) = codes_kn.astype(np.float64).copy(), grids
    for k in range(len(codes))[rows]:
        points = scale * (codes - zero)
        best = points[k] + h_kk[k] @ (target_kn - points) / h_kk[k, k]
        codes[k] = nearest_codes(best, (scale[k], zero[k]), bits)
    return codes


def best_grid(
    codes_kn: np.ndarray,
    w_kn: np.ndarray,
    h_kk: np.ndarray,
    grids: Grid,
    group: slice,
    zeros: Iterable[int],
) -> Grid:
    """The scale and zero point of a group with the least loss for given codes, all other groups held: for each of these zero
    points the scale at which the derivative is zero, in float16, and the loss written out."""
    best = []
    for n in range(w_kn.shape[1]):

        def loss(scale: float, zero: float, n: int = n) -> float:
            points = grids[0][:, n] * (codes_kn[:, n] - grids[1][:, n])
            points[group] = scale * (codes_kn[group, n] - zero)
            return (w_kn[:, n] - points) @ h_kk @ (w_kn[:, n] - points)

        candidates = [(grids[0][group, n][0], grids[1][group, n][0])]
        for zero in zeros:
            rest, steps = grids[0][:, n] * (codes_kn[:, n] - grids[1][:, n]), np.zeros(len(w_kn))
            rest[group], steps[group] = 0.0, codes_kn[group, n] - zero
            scale = np.float64(np.float16(steps @ h_kk @ (w_kn[:, n] - rest) / (steps @ h_kk @ steps)))
            candidates += [(scale, zero)] if scale > 0 else []
        best.append(min(candidates, key=lambda candidate: loss(*candidate)))
    return tuple(np.asarray(part, np.float64) for part in zip(*best, strict=True))


def output_loss(dw_kn: np.ndarray, h_kk: np.ndarray) -> float:
    """tr(dW^T H dW)."""
    return float(np.trace(dw_kn.T @ h_kk @ dw_kn))


def alibi_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int | None) -> np.ndarray:
    """Causal attention `[b, S, H F]` with a linear penalty on distance, one query of one head at a time."""
    samples, length, heads, width = q.shape
    power = 2 ** int(np.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]
    mixed = np.zeros(q.shape)
    for b, head, i in np.ndindex(samples, heads, length):
        shared = head * k.shape[2] // heads
        first = 0 if window is None else max(0, i - window + 1)
        seen = np.arange(first, i + 1)
        scores = k[b, seen, shared].astype(np.float64) @ q[b, i, head] / np.sqrt(width) - slopes[head] * (i - seen)
        weights = np.exp(scores - scores.max())
        mixed[b, i, head] = weights / weights.sum() @ v[b, seen, shared]
    return mixed.reshape(samples, length, -1)
