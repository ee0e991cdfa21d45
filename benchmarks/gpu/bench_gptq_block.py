"""The solver's inner loop on a GPU: the kernel against plain JAX, codes first, then times; and whole solves.

    python benchmarks/gpu/bench_gptq_block.py check       # codes, with grids that are given and that are searched
    python benchmarks/gpu/bench_gptq_block.py time        # one block of 128 rows and 4096 columns
    python benchmarks/gpu/bench_gptq_block.py solve       # a whole solve, 4096 x 4096
    python benchmarks/gpu/bench_gptq_block.py solve_wide  # K = 14336, N = 4096

Codes are bit for bit those of plain JAX where sums are exact; else the fraction that differs is checked. Times of a block are
slopes (`timing.py`). A whole solve is Hessian excluded, factor included, the quickest of `--repeats` calls; the targets are 4 ms
and 90 ms.
"""

import dataclasses
import functools
from typing import Any

import paths  # isort: skip  # noqa: F401
import jax
import jax.numpy as jnp
from random_blocks import block_of
from records import Record, arguments, require_gpu
from timing import device_times, seconds, slopes

from jgptq.settings.solver import SolverConfig
from jgptq.solver import prepare, solve_columns
from pallas_kernels import Backend, gptq_block
from pallas_kernels.gptq_block.shapes import Shape, shapes_of

SIZES = {"solve": (4096, 4096), "solve_wide": (14336, 4096)}
TARGET_MS = {"solve": 4.0, "solve_wide": 90.0}
BLOCKS = 4
"""Operands of a pass: a block is small, and is in the cache when the solver calls the kernel as well."""
DIFFER_GIVEN, DIFFER_SEARCHED = 0.01, 0.05
"""Fractions of codes that may differ. A sum in another order chooses another scale for a few columns, and with it all their
codes."""


def check(record: Record, rehearse: bool, seed: int) -> bool:
    """Whether codes of the kernel are those of plain JAX; an error in one shape is recorded, and the next is tried."""
    all_right = True
    for shape in shapes_of("rehearse" if rehearse else "check"):
        exact = [True, False] if shape.grids != "searched" and not shape.drift else [False]
        for sums_are_exact in exact:
            row: dict[str, Any] = {"shape": str(shape), "exact": sums_are_exact, "seed": seed}
            try:
                row |= compared(shape, sums_are_exact, rehearse, seed)
            except Exception as error:
                row |= {"right": False, "error": f"{type(error).__name__}: {error}"[:2000]}
            all_right &= row["right"]
            record.add("checks", row)
    return all_right


def compared(shape: Shape, exact: bool, rehearse: bool, seed: int) -> dict[str, Any]:
    """The fraction of codes that differ, and whether that is allowed."""
    operands = block_of(shape, exact=exact, seed=seed)
    backends: tuple[Backend, ...] = ("interpret" if rehearse else "triton", "jax")
    codes = [runs(shape, backend)(*operands).codes_rn for backend in backends]
    differ = float(jnp.mean(codes[0] != codes[1]))
    allowed = 0.0 if exact else DIFFER_SEARCHED if shape.grids == "searched" else DIFFER_GIVEN
    return {"differ": differ, "allowed": allowed, "right": differ <= allowed}


def runs(shape: Shape, backend: Backend) -> Any:
    """A block as a program."""
    return jax.jit(functools.partial(gptq_block, bits=shape.bits, backend=backend))


def time_blocks(record: Record, rehearse: bool, repeats: int) -> None:
    """Microseconds of one block, the kernel and plain JAX in turns."""
    for shape in shapes_of("rehearse" if rehearse else "time"):
        operands = [block_of(shape, seed=seed)[1:] for seed in range(BLOCKS)]
        w_rn = block_of(shape, seed=BLOCKS)[0]
        backends: tuple[Backend, ...] = ("interpret" if rehearse else "triton", "jax")

        def step(w_rn: jax.Array, block: Any, run: Any) -> jax.Array:
            # The error is what the rows of the next block read.
            return w_rn + run(w_rn, *block).error_rn * jnp.float32(1e-30)

        steps = {name: (functools.partial(step, run=runs(shape, name)), w_rn, operands) for name in backends}
        times = slopes(steps, repeats)
        profiled = device_times(functools.partial(runs(shape, backends[0]), w_rn, *operands[0]))
        row = {f"{name}_us": slope.seconds * 1e6 for name, slope in times.items()}
        record.add("blocks", {"shape": str(shape), **row, "profiled_us": profiled})


def solve(record: Record, part: str, rehearse: bool, repeats: int) -> None:
    """A whole solve on the device."""
    k, n = (256, 128) if rehearse else SIZES[part]
    h_tk = jax.random.normal(jax.random.key(0), (2 * k, k), jnp.float32) * jnp.exp(jax.random.normal(jax.random.key(1), (k,)))
    h_kk = jnp.matmul(h_tk.T, h_tk, precision=jax.lax.Precision.HIGHEST) / k
    w_kn = jax.random.normal(jax.random.key(2), (k, n), jnp.float32) * 0.05
    for name, config in (("searched", SolverConfig()), ("minmax", SolverConfig(scale="minmax"))):
        started = functools.partial(prepare, h_kk, config)
        prepared = started()
        whole = jax.jit(lambda w_kn, h_kk, config=config: solve_columns(w_kn, prepare(h_kk, config), config))
        of = {
            "solve": functools.partial(whole, w_kn, h_kk),
            "prepare": started,
            "columns": functools.partial(solve_columns, w_kn, prepared, config),
        }
        times = {f"{key}_ms": min(values) * 1e3 for key, values in seconds(of, repeats).items()}
        outcome = int(of["columns"]().outcome)
        row = {"k": k, "n": n, "grids": name, "outcome": outcome, **times, "target_ms": TARGET_MS[part]}
        record.add("solves", row | {"settings": dataclasses.asdict(config)})


def main() -> None:
    parser = arguments(__doc__, ("check", "time", *SIZES))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    require_gpu(args.rehearse)
    record, repeats = Record(args.record), 2 if args.rehearse else args.repeats
    if args.part == "check":
        if not check(record, args.rehearse, args.seed):
            raise SystemExit("codes differ, or a kernel did not run: see the rows above that are not right")
    elif args.part == "time":
        time_blocks(record, args.rehearse, repeats)
    else:
        solve(record, args.part, args.rehearse, repeats)


if __name__ == "__main__":
    main()
