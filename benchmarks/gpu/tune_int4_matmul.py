"""The quickest of a few tilings for each product, timed on a GPU.

    python benchmarks/gpu/tune_int4_matmul.py --record tunings.json [--seconds 150]    # on a GPU
    python benchmarks/gpu/tune_int4_matmul.py --adopt gpu.json                         # anywhere: into the committed table

Tried are the rule's tiling and the ten that differ least from it, in turns, on cold weights; one that fails to compile is passed
over. What beats the rule by more than 3 % is adopted into `pallas_kernels/int4_matmul/tunings.json`, from a record of this script
or of `run_all.py`.
"""

import dataclasses
import functools
import json
import time
from pathlib import Path
from typing import Any

import paths  # isort: skip
import jax
import jax.numpy as jnp
from bench_int4_matmul import random_kernel
from records import Record, arguments, require_gpu, write_json
from timing import COLD_BYTES, chained, slopes

from pallas_kernels import RuntimeKernel
from pallas_kernels.int4_matmul import triton
from pallas_kernels.int4_matmul.shapes import Shape, shapes_of
from pallas_kernels.int4_matmul.triton import Tiling
from pallas_kernels.int4_matmul.tuning import key_of, neighbours, rule

TABLE = paths.ROOT / "pallas_kernels" / "int4_matmul" / "tunings.json"
MOST = 10
GAIN = 1.03


def timed(shape: Shape, tiling: Tiling, kernels: list[RuntimeKernel], rehearse: bool, repeats: int) -> float:
    """Microseconds of a product, the chain included: it is the same for all."""
    x = jax.random.normal(jax.random.key(0), (shape.m, shape.layout.padded_k), jnp.bfloat16)
    product = jax.jit(functools.partial(triton.product, tiling=tiling, interpret=rehearse))
    return slopes({"": (chained(product), x, kernels)}, repeats)[""].seconds * 1e6


def tuned(shape: Shape, rehearse: bool, deadline: float) -> dict[str, Any]:
    """The times of the tilings that were tried before the deadline, the rule's first, and the quickest."""
    first = random_kernel(shape, 0, "triton")
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(first))
    copies = 2 if rehearse else max(2, int(COLD_BYTES // size) + 1)
    kernels = [first, *(random_kernel(shape, seed, "triton") for seed in range(1, copies))]
    ruled = rule(shape.m, shape.layout, jnp.bfloat16)
    tried = neighbours(shape.m, shape.layout, jnp.bfloat16, 2 if rehearse else MOST)
    times: dict[Tiling, float] = {}
    failed = []
    for tiling in [ruled, *tried]:
        if time.monotonic() > deadline:
            break
        try:
            times[tiling] = timed(shape, tiling, kernels, rehearse, 2 if rehearse else 10)
        except Exception as error:
            failed.append({"tiling": dataclasses.asdict(tiling), "error": f"{type(error).__name__}: {error}"[:500]})
    row: dict[str, Any] = {"shape": str(shape), "failed": failed, "skipped": 1 + len(tried) - len(times) - len(failed)}
    row["times_us"] = [[dataclasses.asdict(tiling), value] for tiling, value in times.items()]
    if ruled in times:
        best = min(times, key=lambda tiling: times[tiling])
        row |= {"gain": times[ruled] / times[best], "best": dataclasses.asdict(best)}
        row["key"] = key_of(jax.devices()[0].device_kind, jax.__version__, shape.m, shape.layout, jnp.bfloat16)
    return row


def adopt(path: Path, table: Path = TABLE) -> int:
    """Puts what beats the rule into the table; entries of the same product that do not are dropped. Returns how many there are.

    Args:
      path: a record of this script, or of `run_all.py`.
      table: the committed table.
    """
    record = json.loads(path.read_text())
    record = record["entries"]["tune"]["result"] if "entries" in record else record
    known = json.loads(table.read_text())
    for row in record["tunings"]:
        if "key" in row:
            known.pop(row["key"], None)
            if row["gain"] > GAIN:
                known[row["key"]] = row["best"]
    write_json(table, dict(sorted(known.items())))
    return len(known)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=150, help="after which no tiling is begun")
    parser.add_argument("--adopt", type=Path, help="a record; the table is made from it")
    args = parser.parse_args()
    if args.adopt is not None:
        print(f"{adopt(args.adopt)} entries in {TABLE}")
        return
    require_gpu(args.rehearse)
    record, deadline = Record(args.record), time.monotonic() + args.seconds
    record.put(seconds=args.seconds)
    for shape in shapes_of("rehearse")[:1] if args.rehearse else shapes_of("tune"):
        record.add("tunings", tuned(shape, args.rehearse, deadline))


if __name__ == "__main__":
    main()
