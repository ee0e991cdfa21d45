"""A factor and a solve on the GPU against float64 and against the CPU.

    python benchmarks/gpu/check_solver.py

The factor R of the damped Hessian: `R^T R` in float64 is the Hessian to the rounding of float32, which a product in TF32 would
miss by a factor of a thousand. The codes: their loss in float64 is that of the codes which another process computes on the CPU.
"""

import argparse
from pathlib import Path
from typing import Any

import paths  # isort: skip  # noqa: F401
import jax.numpy as jnp
import numpy as np
from on_cpu import start_on_cpu
from records import Record, arguments, require_gpu

from jgptq.settings.solver import SolverConfig
from jgptq.solver import prepare, solve_columns

CONFIGS = {
    "group 128": SolverConfig(),
    "group 32, asymmetric": SolverConfig(group_size=32, sym=False),
    "act-order": SolverConfig(order="desc_act"),
}
FACTOR_ERROR = 1e-5
"""Of `R^T R`, relative to the norm of the Hessian."""
LOSS_RATIO = 0.01


def problem(rehearse: bool) -> tuple[np.ndarray, np.ndarray]:
    """A Hessian with uneven, correlated features, and weights."""
    k, n = (256, 32) if rehearse else (2048, 512)
    random = np.random.default_rng(0)
    mix_kk = np.eye(k) + 0.3 * random.standard_normal((k, k)) / np.sqrt(k)
    h_tk = random.standard_normal((4 * k, k)) @ mix_kk * np.exp(0.5 * random.standard_normal(k))
    return (h_tk.T @ h_tk / (2 * k)).astype(np.float32), random.standard_normal((k, n)).astype(np.float32) * 0.05


def solved(h_kk: np.ndarray, w_kn: np.ndarray, config: SolverConfig) -> dict[str, np.ndarray]:
    """What is compared, from this process' device."""
    prepared = prepare(jnp.asarray(h_kk), config)
    solution = solve_columns(jnp.asarray(w_kn), prepared, config)
    values = {"r_kk": prepared.factor, "rows_k": prepared.sequence.rows_k[::-1], "damping": prepared.damping}
    return {name: np.asarray(value) for name, value in values.items()} | {
        "codes_kn": np.asarray(solution.codes_kn),
        "w_kn": np.asarray(solution.dequantize()),
        "outcome": np.asarray(solution.outcome),
    }


def factor_error(h_kk: np.ndarray, here: dict[str, np.ndarray]) -> float:
    """The error of `R^T R` relative to the norm of the permuted, damped Hessian."""
    h64 = h_kk.astype(np.float64)
    damped = h64 + float(here["damping"]) * np.mean(np.diag(h64)) * np.eye(len(h64))
    expected = damped[np.ix_(here["rows_k"], here["rows_k"])]
    r64 = np.triu(here["r_kk"].astype(np.float64))
    return float(np.linalg.norm(r64.T @ r64 - expected) / np.linalg.norm(expected))


def compared(name: str, rehearse: bool) -> dict[str, Any]:
    """One configuration on this device and on the CPU."""
    h_kk, w_kn = problem(rehearse)
    from_cpu = start_on_cpu(__file__, "--config", name, *(["--rehearse"] if rehearse else []))
    here, there = solved(h_kk, w_kn, CONFIGS[name]), from_cpu()
    losses = []
    for side in (here, there):
        lost_kn = w_kn.astype(np.float64) - side["w_kn"]
        losses.append(float(np.sum(lost_kn * (h_kk.astype(np.float64) @ lost_kn))))
    same_kn = here["codes_kn"] == there["codes_kn"]
    error, ratio = factor_error(h_kk, here), losses[0] / losses[1]
    return {
        "config": name,
        "factor_error": error,
        "factor_error_cpu": factor_error(h_kk, there),
        "loss_over_cpu": ratio,
        "codes_that_differ": float(1 - same_kn.mean()),
        "columns_that_differ": float(1 - same_kn.all(axis=0).mean()),
        "right": bool(error < FACTOR_ERROR and abs(ratio - 1) < LOSS_RATIO and here["outcome"] == there["outcome"]),
    }


def main() -> None:
    parser: argparse.ArgumentParser = arguments(__doc__)
    parser.add_argument("--save", type=Path, help="only solve, and write the arrays")
    parser.add_argument("--config", choices=list(CONFIGS))
    args = parser.parse_args()
    if args.save is not None:
        np.savez(args.save, **solved(*problem(args.rehearse), CONFIGS[args.config]))
        return
    require_gpu(args.rehearse)
    record, all_right = Record(args.record), True
    for name in list(CONFIGS)[: 1 if args.rehearse else None]:
        try:
            row = compared(name, args.rehearse)
        except Exception as error:
            row = {"config": name, "right": False, "error": f"{type(error).__name__}: {error}"[:2000]}
        all_right &= row["right"]
        record.add("checks", row)
    if not all_right:
        raise SystemExit("the solver is not that of the CPU: see the rows above that are not right")


if __name__ == "__main__":
    main()
