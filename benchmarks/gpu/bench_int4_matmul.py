"""Packed int4 products on a GPU: right first, then how fast, against XLA's bfloat16 matmul and against the floor.

    PYTHONPATH=. python benchmarks/gpu/bench_int4_matmul.py [--quick] [--backend triton] [--name int4_matmul_gpu]

Correctness: fresh random operands against float64, every result written over a buffer of NaN. Times: cold weights, a run through
more copies of them than a cache holds, as one program; the quickest of `--repeats` runs, both sides in turns. The floor is the
larger of the bytes that must come from memory at the speed of a large copy of this run, and the operations at the speed of a
large bfloat16 matmul of this run.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from common import circumstances, write_result
from pallas_kernels.int4_matmul.rows import RowsKernel, to_rows
from pallas_kernels.layout import pack_codes

from pallas_kernels import int4_matmul
from pallas_kernels.int4_matmul.planes import RuntimeKernel, to_runtime
from pallas_kernels.int4_matmul.tuning import tiling_of

SHAPES = ((4096, 4096), (4096, 28672), (14336, 4096), (8192, 57344), (28672, 8192))
QUICK_SHAPES = ((4096, 4096), (14336, 4096))
ROWS = (1, 2, 4, 16, 32, 64, 128, 512, 2048)
QUICK_ROWS = (1, 16, 64, 2048)
GROUP = 128
COLD_BYTES = 300e6
CHECKS = (
    # k, n, group, sym, ordered, m, dtype
    (4096, 4096, 128, True, False, 1, "bfloat16"),
    (4096, 4096, 128, False, False, 3, "bfloat16"),
    (4096, 4104, 32, False, True, 17, "float16"),
    (4128, 1000, 4128, False, False, 33, "bfloat16"),
    (2048, 512, 64, True, False, 64, "float16"),
    (1536, 640, 96, False, True, 129, "bfloat16"),
    (1024, 256, 128, False, False, 5, "float32"),
    (1024, 256, 128, True, False, 257, "bfloat16"),
)


def random_kernel(k: int, n: int, group: int, seed: int, *, sym: bool = True, ordered: bool = False) -> tuple[RuntimeKernel, Any]:
    """A kernel in the runtime layout, and in float64."""
    random = np.random.default_rng(seed)
    groups = k // group
    codes = random.integers(0, 16, (k, n), dtype=np.int32)
    scales = random.uniform(0.01, 0.05, (groups, n)).astype(np.float16)
    zeros = np.full((groups, n), 8) if sym else random.integers(0, 16, (groups, n))
    order = random.permutation(np.arange(k) // group) if ordered else np.arange(k) // group
    kernel = to_runtime(
        pack_codes(jnp.asarray(codes), 4),
        jnp.asarray(scales),
        None if sym else pack_codes(jnp.asarray(zeros).T, 4).T,
        jnp.asarray(order, jnp.int32) if ordered else None,
        group_size=group,
    )
    return kernel, scales.astype(np.float64)[order] * (codes - zeros[order])


def multiplied(x: jax.Array, kernel: RuntimeKernel | RowsKernel) -> jax.Array:
    """By the kernels that read the layout."""
    layout, in_rows = kernel.layout, isinstance(kernel, RowsKernel)
    arrays = (kernel.codes if isinstance(kernel, RowsKernel) else kernel.qweight, kernel.scales, kernel.zeros)
    backend = "mosaic" if in_rows else "triton"
    return int4_matmul(x, *arrays, group_size=layout.group_size, order=kernel.order, layout=layout, backend=backend)


def read_by(backend: str, kernel: RuntimeKernel) -> RuntimeKernel | RowsKernel:
    """The kernel in the layout of a backend."""
    return to_rows(kernel) if backend == "mosaic" else kernel


def check(seed: int, backend: str) -> list[dict[str, Any]]:
    """Every check's largest error, in terms of the root of the sum of squared products."""
    found = []
    for number, (k, n, group, sym, ordered, m, dtype) in enumerate(CHECKS):
        if backend == "mosaic" and dtype == "float32":
            continue
        kernel, w_kn = random_kernel(k, n, group, seed + number, sym=sym, ordered=ordered)
        x = jnp.asarray(np.random.default_rng([seed, number]).standard_normal((m, k)), dtype)
        # What the kernel writes to is freed memory: filled with NaN, a part that it leaves out shows.
        jax.block_until_ready([jnp.full((64, 1 << 20), jnp.nan) for _ in range(4)])
        y = np.asarray(jax.jit(multiplied)(x, read_by(backend, kernel)), np.float64)
        x_mk = np.asarray(x, np.float64)
        error = float(np.max(np.abs(y - x_mk @ w_kn) / np.sqrt(np.square(x_mk) @ np.square(w_kn))))
        limit = {"bfloat16": 2**-6, "float16": 2**-8, "float32": 1e-5}[dtype]
        found.append({"case": [k, n, group, sym, ordered, m, dtype], "error": error, "limit": limit})
        if not error < limit:
            raise SystemExit(f"wrong result: {found[-1]}")
    return found


def seconds(functions: dict[str, tuple[Callable[..., Any], Any]], repeats: int) -> dict[str, list[float]]:
    """Times of programs that take turns."""
    for function, given in functions.values():
        jax.block_until_ready(function(*given))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, (function, given) in functions.items():
            started = time.perf_counter()
            jax.block_until_ready(function(*given))
            times[name].append(time.perf_counter() - started)
    return times


def floors(repeats: int) -> dict[str, float]:
    """Bytes a second of a large copy (read and written), and multiply-adds a second of a large bfloat16 matmul."""
    big, square = jnp.zeros(1 << 29, jnp.bfloat16), jnp.ones((8192, 8192), jnp.bfloat16)
    found = seconds({"copy": (jax.jit(lambda a: a + 1), (big,)), "matmul": (jax.jit(jnp.matmul), (square, square))}, repeats)
    return {"bytes": 2 * big.nbytes / min(found["copy"]), "macs": 8192**3 / min(found["matmul"])}


def timed(k: int, n: int, rows: tuple[int, ...], speed: dict[str, float], repeats: int, backend: str) -> list[dict[str, Any]]:
    """One shape at several numbers of rows."""
    kernel, _ = random_kernel(k, n, GROUP, 0)
    bytes_of = kernel.qweight.nbytes + kernel.scales.nbytes
    copies = max(2, int(COLD_BYTES // bytes_of) + 1)
    kernels = [read_by(backend, jax.tree.map(lambda leaf, c=copy: jnp.roll(leaf, c, axis=0), kernel)) for copy in range(copies)]
    dense_copies = max(2, int(COLD_BYTES // (2 * k * n)) + 1)
    dense = [jax.random.normal(jax.random.key(copy), (k, n), jnp.bfloat16) for copy in range(dense_copies)]
    packed = jax.jit(lambda x, kernels: [multiplied(x, one) for one in kernels])
    plain = jax.jit(lambda x, dense: [jnp.matmul(x, one) for one in dense])
    found = []
    for m in rows:
        x = jax.random.normal(jax.random.key(1), (m, k), jnp.bfloat16)
        times = seconds({"int4": (packed, (x, kernels)), "bf16": (plain, (x, dense))}, repeats)
        ours, theirs = min(times["int4"]) / copies, min(times["bf16"]) / dense_copies
        floor = max((bytes_of + x.nbytes + 2 * m * n) / speed["bytes"], m * k * n / speed["macs"])
        entry = {
            "k": k,
            "n": n,
            "m": m,
            "int4_us": ours * 1e6,
            "bf16_us": theirs * 1e6,
            "times_as_fast": theirs / ours,
            "floor_us": floor * 1e6,
            "of_floor": floor / ours,
            "spread": statistics.median(times["int4"]) / min(times["int4"]),
            "tiling": str(tiling_of(m, kernel.layout, x.dtype)) if backend == "triton" else "",
        }
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in entry.items()}, flush=True)
        found.append(entry)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two shapes and four numbers of rows: less than five minutes")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the checks' operands")
    parser.add_argument("--backend", choices=["triton", "mosaic"], default="triton")
    parser.add_argument("--name", default="int4_matmul_gpu")
    args = parser.parse_args()
    checks = check(args.seed, args.backend)
    print(f"{len(checks)} products are right", flush=True)
    speed = floors(args.repeats)
    shapes, rows = (QUICK_SHAPES, QUICK_ROWS) if args.quick else (SHAPES, ROWS)
    times = [entry for k, n in shapes for entry in timed(k, n, rows, speed, args.repeats, args.backend)]
    result = {
        **circumstances(),
        "backend": args.backend,
        "seed": args.seed,
        "checks": checks,
        "speed": speed,
        "group_size": GROUP,
        "times": times,
    }
    print("wrote", write_result(args.name, result))


if __name__ == "__main__":
    main()
