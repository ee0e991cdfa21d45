"""The published GPTQ loop in torch, the peer of `bench_solver.py`.

A port of `GPTQ.fasterquant` and `Quantizer.find_params` as published with the paper (Frantar et al. 2022): the same operations,
in the same order. `cholesky`, `cholesky_inverse`, `cholesky(upper=True)`; blocks of 128 columns; inside a block column by column,
the grid of a group is set at its first column; one matmul adds a block's errors to the columns after it. Two things
differ, so that both solve the same problem: columns are ordered inside and among groups (published: over all of them, which costs
the same), and scales are rounded to float16, as files hold them. Matrices are `[N, K]`, as in torch.
"""

from typing import NamedTuple

import torch


class Solved(NamedTuple):
    """The solution of the published loop: columns and groups in the solver's sequence, and that sequence."""

    q_nk: torch.Tensor  # dequantized
    scale_gn: torch.Tensor
    order_k: torch.Tensor  # position in the sequence -> column of the matrix
    loss: torch.Tensor  # the sum that the published loop prints: of the damped problem, halved

    def codes(self, bits: int) -> torch.Tensor:
        """Unsigned codes of a symmetric grid `[N, K]`, uint8, columns as in the matrix."""
        n, k = self.q_nk.shape
        scale_nk = self.scale_gn.T.repeat_interleave(k // self.scale_gn.shape[0], dim=1)
        codes_nk = torch.round(self.q_nk / scale_nk) + 2 ** (bits - 1)
        matrix_nk = torch.empty((n, k), dtype=torch.uint8)
        matrix_nk[:, self.order_k] = codes_nk.to(torch.uint8)
        return matrix_nk

    def values(self) -> torch.Tensor:
        """The dequantized matrix `[N, K]`, columns as in the matrix."""
        return self.q_nk[:, torch.argsort(self.order_k)]


def find_params(w_nr: torch.Tensor, max_code: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The symmetric min-max grid of a group: scales and zero points `[N, 1]`."""
    low_n = torch.clamp(w_nr.min(dim=1).values, max=0)
    high_n = torch.clamp(w_nr.max(dim=1).values, min=0)
    high_n = torch.maximum(torch.abs(low_n), high_n)
    low_n = torch.where(low_n < 0, -high_n, low_n)
    empty_n = (low_n == 0) & (high_n == 0)
    low_n[empty_n], high_n[empty_n] = -1, 1
    scale_n = ((high_n - low_n) / max_code).half().float()
    return scale_n.unsqueeze(1), torch.full_like(scale_n, (max_code + 1) / 2).unsqueeze(1)


def quantize(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, max_code: int) -> torch.Tensor:
    """The nearest grid point."""
    return scale * (torch.clamp(torch.round(x / scale) + zero, 0, max_code) - zero)


def group_order(diag_k: torch.Tensor, group_size: int) -> torch.Tensor:
    """Columns by importance inside each group, and groups by their most important column."""
    diag_gr = diag_k.reshape(-1, group_size)
    inner_gr = torch.argsort(-diag_gr, dim=1, stable=True)
    groups_g = torch.argsort(-diag_gr.max(dim=1).values, stable=True)
    return (inner_gr[groups_g] + groups_g[:, None] * group_size).reshape(-1)


@torch.no_grad()
def fasterquant(
    w_nk: torch.Tensor, h_kk: torch.Tensor, *, bits: int, group_size: int, percdamp: float = 0.01, blocksize: int = 128
) -> Solved:
    """Quantizes a matrix by the published loop; its arguments are not modified.

    Args:
      w_nk: float32 `[N, K]`.
      h_kk: float32 `[K, K]`, the Hessian.
      bits: width of a code.
      group_size: columns that share a grid; a divisor of K.
      percdamp: damping, as a fraction of the mean diagonal.
      blocksize: columns between two updates of all later ones.

    Returns:
      The solution.
    """
    columns, max_code = w_nk.shape[1], 2**bits - 1
    W, H = w_nk.clone(), h_kk
    dead = torch.diag(H) == 0
    if dead.any():
        H = H.clone()  # the published loop changes its own Hessian in place
        H[dead, dead] = 1
        W[:, dead] = 0
    order = group_order(torch.diag(H), group_size)
    W = W[:, order]
    H = H[order][:, order]

    Losses, Q = torch.zeros_like(W), torch.zeros_like(W)
    damp = percdamp * torch.mean(torch.diag(H))
    diag = torch.arange(columns)
    H[diag, diag] += damp
    H = torch.linalg.cholesky(H)
    H = torch.cholesky_inverse(H)
    H = torch.linalg.cholesky(H, upper=True)
    Hinv = H

    scales = []
    for i1 in range(0, columns, blocksize):
        i2 = min(i1 + blocksize, columns)
        W1 = W[:, i1:i2].clone()
        Q1, Err1, Losses1 = torch.zeros_like(W1), torch.zeros_like(W1), torch.zeros_like(W1)
        Hinv1 = Hinv[i1:i2, i1:i2]
        for i in range(i2 - i1):
            w, d = W1[:, i], Hinv1[i, i]
            if (i1 + i) % group_size == 0:
                scale, zero = find_params(W[:, (i1 + i) : (i1 + i + group_size)], max_code)
                scales.append(scale.flatten())
            q = quantize(w.unsqueeze(1), scale, zero, max_code).flatten()
            Q1[:, i] = q
            Losses1[:, i] = (w - q) ** 2 / d**2
            err1 = (w - q) / d
            W1[:, i:] -= err1.unsqueeze(1).matmul(Hinv1[i, i:].unsqueeze(0))
            Err1[:, i] = err1
        Q[:, i1:i2] = Q1
        Losses[:, i1:i2] = Losses1 / 2
        W[:, i2:] -= Err1.matmul(Hinv[i1:i2, i2:])
    return Solved(Q, torch.stack(scales), order, torch.sum(Losses))


@torch.no_grad()
def losses(w_nk: torch.Tensor, h_kk: torch.Tensor, solved: Solved, *, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`dW^T H dW` of each row `[N]`, of the solution and of round-to-nearest, both of which jgptq reports."""
    w_gr = w_nk.reshape(-1, w_nk.shape[1] // solved.scale_gn.shape[0])
    rounded_nk = quantize(w_gr, *find_params(w_gr, 2**bits - 1), 2**bits - 1).reshape(w_nk.shape)
    off_nk, rtn_off_nk = w_nk - solved.values(), w_nk - rounded_nk
    return torch.sum(off_nk * (off_nk @ h_kk), dim=1), torch.sum(rtn_off_nk * (rtn_off_nk @ h_kk), dim=1)
