"""The solver on a GPU: its inner loop as a kernel against plain JAX, codes first, then times; and a whole solve with each.

    PYTHONPATH=. python benchmarks/gpu/bench_gptq_block.py [--quick] [--name gptq_block_gpu]

Codes: bit for bit those of plain JAX where sums are exact, and the fraction that differs where they are not. Times: the quickest
of `--repeats` runs, both in turns. The whole solve is Hessian excluded, factor included; the targets are 4 ms at 4096 x 4096 and
90 ms at K = 14336, N = 4096.
"""

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from bench_int4_matmul import seconds
from common import circumstances, write_result

from jgptq.config import QuantizeConfig
from jgptq.solver import prepare, solve_columns
from pallas_kernels import gptq_block

TARGET_MS = {(4096, 4096): 4.0, (14336, 4096): 90.0}


def block(rows: int, n: int, seed: int, exact: bool) -> list[jax.Array]:
    """Operands of one block; where `exact`, of so few bits that no sum is rounded."""
    random = np.random.default_rng(seed)
    if exact:
        u_rr = np.eye(rows) + np.triu(random.integers(-1, 2, (rows, rows)) * (random.random((rows, rows)) < 0.05), 1)
        w_rn, scale_rn = random.integers(-24, 25, (rows, n)) / 2, np.ones((1, n))
    else:
        u_rr = np.linalg.cholesky(np.cov(random.standard_normal((rows, 4 * rows))) + 0.1 * np.eye(rows)).T
        w_rn, scale_rn = random.standard_normal((rows, n)), random.uniform(0.1, 0.3, (1, n))
    return [jnp.asarray(part, jnp.float32) for part in (w_rn, u_rr, scale_rn, random.integers(0, 16, (1, n)))]


def check(seed: int) -> dict[str, float]:
    """Fractions of codes that differ; none may where sums are exact."""
    run = {backend: jax.jit(functools.partial(gptq_block, bits=4, backend=backend)) for backend in ("triton", "jax")}
    differ = {}
    for name, exact in (("exact", True), ("rounded", False)):
        operands = block(128, 4096, seed, exact)
        codes = [np.asarray(run[backend](*operands).codes_rn) for backend in run]
        differ[name] = float(np.mean(codes[0] != codes[1]))
    if differ["exact"] > 0 or differ["rounded"] > 0.01:
        raise SystemExit(f"codes differ: {differ}")
    return differ


def solves(k: int, n: int, repeats: int) -> dict[str, Any]:
    """A whole solve on the device."""
    h = jax.random.normal(jax.random.key(0), (2 * k, k), jnp.float32) * jnp.exp(jax.random.normal(jax.random.key(1), (k,)))
    h_kk, w_kn = h.T @ h / k, jax.random.normal(jax.random.key(2), (k, n), jnp.float32) * 0.05
    config = QuantizeConfig()
    solve = jax.jit(lambda w_kn, h_kk: solve_columns(w_kn, prepare(h_kk, config), config))
    factor = jax.jit(lambda h_kk: prepare(h_kk, config))
    times = seconds({"solve": (solve, (w_kn, h_kk)), "prepare": (factor, (h_kk,))}, repeats)
    found = {"k": k, "n": n, **{f"{name}_ms": min(values) * 1e3 for name, values in times.items()}, "target_ms": TARGET_MS[k, n]}
    print(found, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4096 x 4096 alone")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="gptq_block_gpu")
    args = parser.parse_args()
    differ = check(args.seed)
    print("codes that differ:", differ, flush=True)
    run = {backend: jax.jit(functools.partial(gptq_block, bits=4, backend=backend)) for backend in ("triton", "jax")}
    operands = block(128, 4096, 1, False)
    times = seconds({backend: (function, operands) for backend, function in run.items()}, args.repeats)
    of_block = {f"{backend}_us": min(values) * 1e6 for backend, values in times.items()}
    print(of_block, flush=True)
    whole = [solves(k, n, args.repeats) for k, n in list(TARGET_MS)[: 1 if args.quick else 2]]
    print("wrote", write_result(args.name, {**circumstances(), "differ": differ, "block_128x4096": of_block, "solves": whole}))


if __name__ == "__main__":
    main()
