"""Makes the tuning table on a GPU: every way of cutting a product up that compiles well, timed on cold weights.

    PYTHONPATH=. python benchmarks/gpu/tune_int4_matmul.py [--shapes 4096x4096,4096x28672] [--rows 1,16,64]

For each shape and bucket of rows: what `pallas_kernels.tuning.candidates` lists is compiled first, for the GPU that is here; what
spills registers or fails is sorted out before anything is timed. The quickest of the rest goes into `pallas_kernels/tunings.json`
where it beats the rule by more than 3 %; an entry that no longer does is taken out.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import aot_kernels
import jax
import jax.numpy as jnp
from bench_int4_matmul import COLD_BYTES, GROUP, SHAPES, random_kernel, seconds

from pallas_kernels import int4_decode
from pallas_kernels.int4_decode import Tiling
from pallas_kernels.planes import RuntimeKernel
from pallas_kernels.tuning import BUCKETS, candidates, key_of, rule

TABLE = Path(int4_decode.__file__).parent / "tunings.json"
GAIN = 1.03


def program(kernels: list[RuntimeKernel], tiling: Tiling) -> Any:
    """A run through all copies of the weights."""

    def run(x: jax.Array, kernels: list[RuntimeKernel]) -> list[jax.Array]:
        return [
            int4_decode.product(x, one.qweight, one.scales, one.zeros, one.layout, tiling, interpret=False) for one in kernels
        ]

    return jax.jit(run)


def compiles_well(x: jax.Array, kernel: RuntimeKernel, tiling: Tiling) -> bool:
    """Whether it compiles, and keeps its values in registers."""
    try:
        compiled = program([kernel], tiling).lower(x, [kernel]).compile()
    except Exception as error:  # whatever the compiler says: it is printed, and the candidate is out
        print("  out:", tiling, str(error).splitlines()[0][:120])
        return False
    found = aot_kernels.kernels(compiled)
    return all(facts.get("stack", 0) == 0 for name, facts in found.items() if name.startswith("int"))


def best(k: int, n: int, m: int, repeats: int) -> tuple[str, Tiling | None]:
    """The quickest tiling of one product, or None where the rule is as good."""
    kernel, _ = random_kernel(k, n, GROUP, 0)
    copies = max(2, int(COLD_BYTES // (kernel.qweight.nbytes + kernel.scales.nbytes)) + 1)
    kernels = [jax.tree.map(lambda leaf, c=copy: jnp.roll(leaf, c, axis=0), kernel) for copy in range(copies)]
    x = jax.random.normal(jax.random.key(0), (m, kernel.layout.padded_k), jnp.bfloat16)
    ruled = rule(m, kernel.layout, x.dtype)
    tried = [ruled, *(one for one in candidates(m, kernel.layout, x.dtype) if one != ruled)]
    usable = [tiling for tiling in tried if compiles_well(x, kernel, tiling)]
    times = {tiling: min(seconds({"": (program(kernels, tiling), (x, kernels))}, repeats)[""]) for tiling in usable}
    quickest = min(times, key=lambda tiling: times[tiling])
    gain = times[ruled] / times[quickest]
    print(f"{k} x {n}, M {m}: {times[quickest] / copies * 1e6:.2f} us, {gain:.2f} times the rule's speed, {quickest}", flush=True)
    key = key_of(jax.devices()[0].device_kind, jax.__version__, m, kernel.layout, x.dtype)
    return key, quickest if gain > GAIN else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(f"{k}x{n}" for k, n in SHAPES))
    parser.add_argument("--rows", default=",".join(map(str, BUCKETS)))
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    table = json.loads(TABLE.read_text())
    for shape in args.shapes.split(","):
        k, n = map(int, shape.split("x"))
        for m in map(int, args.rows.split(",")):
            key, tiling = best(k, n, m, args.repeats)
            table.pop(key, None)
            if tiling is not None:
                table[key] = dataclasses.asdict(tiling)
            TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
