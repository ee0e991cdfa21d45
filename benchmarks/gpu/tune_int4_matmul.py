"""Makes the tuning table: ways of cutting a product up that compile well, then the quickest of them on a GPU.

    PYTHONPATH=.aot:. python benchmarks/gpu/tune_int4_matmul.py --prune      # needs no GPU: what compiles well, to a file
    PYTHONPATH=. python benchmarks/gpu/tune_int4_matmul.py                   # on a GPU: times what the file lists

For each shape and bucket of rows `tuning.candidates` lists what may be tried. Pruning compiles each for an H200 and drops what
spills, what takes more registers than half a multiprocessor has, and what should have become wgmma and has not. The quickest of
the rest, on cold weights, goes into `pallas_kernels/int4_matmul/tunings.json` where it beats the rule by more than 3 %.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
PRUNE = "--prune" in sys.argv
if PRUNE:
    import aot_kernels  # before jax

import jax
import jax.numpy as jnp
from bench_int4_matmul import COLD_BYTES, GROUP, SHAPES, random_kernel, seconds

from pallas_kernels.int4_matmul import triton
from pallas_kernels.int4_matmul.planes import Planes, RuntimeKernel
from pallas_kernels.int4_matmul.triton import Tiling
from pallas_kernels.int4_matmul.tuning import BUCKETS, candidates, key_of, rule

TABLE = Path(triton.__file__).parent / "tunings.json"
LISTED = HERE.parent / "results" / "tuning_candidates.json"
GAIN = 1.03
REGISTERS = 65536 // 2


def prune(shapes: list[tuple[int, int]], rows: list[int]) -> None:
    """Writes what compiles well."""
    from compile_kernels import product_case

    target = aot_kernels.aot.topology(1)
    listed = json.loads(LISTED.read_text()) if LISTED.exists() else {}
    for k, n in shapes:
        layout = Planes(k=k, n=n, bits=4, group_size=GROUP)
        for m in rows:
            kept = []
            seen: dict[Tiling, bool] = {}
            for tiling in candidates(m, layout, jnp.bfloat16):
                alike = dataclasses.replace(tiling, parts=1)  # how many parts K has changes the ends of a loop alone
                if alike not in seen:
                    case = product_case("", m, layout, jnp.bfloat16, False, tiling)
                    found = aot_kernels.facts(case.function, case.operands, target, case.kernel, 0)
                    fits = found["spilled_bytes"] == 0 and found["registers"] * tiling.warps * 32 <= REGISTERS
                    seen[alike] = fits and (tiling.form != "swapped" or "wgmma" in found)
                if seen[alike]:
                    kept.append(dataclasses.asdict(tiling))
            listed[f"{k}x{n}, M {m}"] = kept
            print(f"{k}x{n}, M {m}: {len(kept)} of {len(candidates(m, layout, jnp.bfloat16))}", flush=True)
            LISTED.write_text(json.dumps(listed) + "\n")


def program(kernels: list[RuntimeKernel], tiling: Tiling) -> Any:
    """A run through all copies of the weights."""

    def run(x: jax.Array, kernels: list[RuntimeKernel]) -> list[jax.Array]:
        return [triton.product(x, one.qweight, one.scales, one.zeros, one.layout, tiling, interpret=False) for one in kernels]

    return jax.jit(run)


def best(k: int, n: int, m: int, tried: list[Tiling], repeats: int) -> tuple[str, Tiling | None]:
    """The quickest tiling of one product, or None where the rule is as good."""
    kernel, _ = random_kernel(k, n, GROUP, 0)
    copies = max(2, int(COLD_BYTES // (kernel.qweight.nbytes + kernel.scales.nbytes)) + 1)
    kernels = [jax.tree.map(lambda leaf, c=copy: jnp.roll(leaf, c, axis=0), kernel) for copy in range(copies)]
    x = jax.random.normal(jax.random.key(0), (m, kernel.layout.padded_k), jnp.bfloat16)
    ruled = rule(m, kernel.layout, x.dtype)
    times = {
        tiling: min(seconds({"": (program(kernels, tiling), (x, kernels))}, repeats)[""])
        for tiling in dict.fromkeys([ruled, *tried])
    }
    quickest = min(times, key=lambda tiling: times[tiling])
    gain = times[ruled] / times[quickest]
    print(f"{k} x {n}, M {m}: {times[quickest] / copies * 1e6:.2f} us, {gain:.2f} times the rule's speed, {quickest}", flush=True)
    key = key_of(jax.devices()[0].device_kind, jax.__version__, m, kernel.layout, x.dtype)
    return key, quickest if gain > GAIN else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prune", action="store_true", help="compile without a GPU, and list what compiles well")
    parser.add_argument("--shapes", default=",".join(f"{k}x{n}" for k, n in SHAPES))
    parser.add_argument("--rows", default=",".join(map(str, BUCKETS)))
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    shapes = [(int(k), int(n)) for k, n in (shape.split("x") for shape in args.shapes.split(","))]
    rows = list(map(int, args.rows.split(",")))
    if args.prune:
        prune(shapes, rows)
        return
    table, listed = json.loads(TABLE.read_text()), json.loads(LISTED.read_text())
    for k, n in shapes:
        for m in rows:
            key, tiling = best(k, n, m, [Tiling(**one) for one in listed.get(f"{k}x{n}, M {m}", [])], args.repeats)
            table.pop(key, None)
            if tiling is not None:
                table[key] = dataclasses.asdict(tiling)
            TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
