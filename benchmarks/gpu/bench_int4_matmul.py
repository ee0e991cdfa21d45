"""Packed int4 products on a GPU: right first, then how fast, against XLA's bfloat16 matmul and against the floor.

    python benchmarks/gpu/bench_int4_matmul.py check       # against float64, all shapes of the list
    python benchmarks/gpu/bench_int4_matmul.py ceilings    # a large copy and a large bfloat16 matmul
    python benchmarks/gpu/bench_int4_matmul.py time_first  # three shapes, M of 1, 16, 64, 128
    python benchmarks/gpu/bench_int4_matmul.py time        # all shapes and M

`--backend mosaic` is the kernel in Mosaic GPU. A check has fresh random operands, and its result is written over a buffer of NaN.
Times are slopes (`timing.py`) over cold weights, what the chain itself costs taken off both sides. The floor is the larger of the
bytes that must come from memory at the speed of a large copy of this run, and the operations at that of a large bfloat16 matmul
of this run. Weights are random words, made on the device.
"""

import time
from typing import Any

import paths  # isort: skip  # noqa: F401
import jax
import jax.numpy as jnp
from random_codes import case_of, excess, random_rows
from records import Record, arguments, require_gpu
from timing import COLD_BYTES, Slope, chained, device_times, seconds, slopes

from pallas_kernels import Backend, Int4RowsKernel, RuntimeKernel, dequantize_runtime, int4_matmul_runtime, to_int4_rows
from pallas_kernels.int4_matmul import mosaic
from pallas_kernels.int4_matmul.int4_rows import from_int4_rows
from pallas_kernels.int4_matmul.shapes import Shape, shapes_of
from pallas_kernels.int4_matmul.tuning import tiling_of

Kernel = RuntimeKernel | Int4RowsKernel
ALLOWED = 1.5
"""Times the bound of `random_codes.excess`, which is four standard deviations of rounded weights: seeds are new in every run, and
the right product of some seeds is a little above it."""
ERROR_OF_TIMED = 2.0**-7
"""Relative to the norm of the result, bfloat16: rounding gives 2^-9."""


def runs_on(backend: Backend, shape: Shape) -> bool:
    """Whether a backend has a kernel for a shape."""
    return backend != "mosaic" or (shape.bits == 4 and shape.dtype != "float32")


def ran_by(backend: Backend, rehearse: bool) -> Backend:
    """The backend itself; in a rehearsal Pallas' interpreter, and plain JAX for Mosaic GPU."""
    return backend if not rehearse else "jax" if backend == "mosaic" else "interpret"


def check(record: Record, backend: Backend, rehearse: bool, seed: int) -> bool:
    """Whether every product is right; an error in one is recorded, and the next is tried."""
    ran, all_right = ran_by(backend, rehearse), True
    for number, shape in enumerate(shapes_of("rehearse" if rehearse else "check")):
        if not runs_on(backend, shape):
            continue
        row: dict[str, Any] = {"shape": str(shape), "seed": seed + number}
        try:
            packed = case_of(shape, seed + number)
            x = random_rows(shape.m, shape.k, shape.dtype, seed + number)
            kernel: Kernel = to_int4_rows(packed.kernel) if backend == "mosaic" else packed.kernel
            # What the kernel writes to is freed memory: with NaN in it, a part that is never written shows.
            jax.block_until_ready([jnp.full((64, 1 << (12 if rehearse else 20)), jnp.nan) for _ in range(4)])
            y = jax.jit(lambda x, kernel: int4_matmul_runtime(x, kernel, backend=ran))(x, kernel)
            error = excess(y, x, packed.w_kn)
            row |= {"error_of_allowed": error, "right": error <= ALLOWED}
        except Exception as error:
            row |= {"right": False, "error": f"{type(error).__name__}: {error}"[:2000]}
        all_right &= row["right"]
        record.add("checks", row)
    return all_right


def ceilings(rehearse: bool, repeats: int = 20) -> dict[str, float]:
    """Bytes a second of a large copy (read and written), and multiply-adds a second of a large bfloat16 matmul."""
    size, side = (1 << 20, 256) if rehearse else (1 << 29, 8192)
    big = jnp.ones(size, jnp.bfloat16)
    square = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16) / side**0.5
    copy, multiply = jax.jit(lambda a: a + jnp.asarray(1, a.dtype)), jax.jit(jnp.matmul)
    times = seconds({"copy": lambda: copy(big), "matmul": lambda: multiply(square, square)}, repeats)
    return {"bytes_per_second": 2 * big.nbytes / min(times["copy"]), "macs_per_second": side**3 / min(times["matmul"])}


def random_kernel(shape: Shape, seed: int, backend: Backend) -> Kernel:
    """A kernel of random words, made on the device."""
    layout = shape.layout
    words, scales = jax.random.split(jax.random.key(seed))
    bits = jax.random.bits(words, (layout.tiles * layout.words, layout.padded_n), jnp.uint32)
    uniform = jax.random.uniform(scales, (layout.scale_count, layout.padded_n), jnp.float32, 0.5, 1.5)
    kernel = RuntimeKernel(
        qweight=jax.lax.bitcast_convert_type(bits, jnp.int32),
        scales=(uniform / (4.6 * layout.k**0.5)).astype(jnp.bfloat16),  # 4.6: a code's standard deviation
        zeros=None,
        row_order=None,
        layout=layout,
    )
    return to_int4_rows(kernel) if backend == "mosaic" else kernel


def error_of(x: jax.Array, kernel: Kernel, backend: Backend) -> float:
    """The error of a product relative to its norm, against plain JAX in float32 on the same device."""

    @jax.jit
    def error(x: jax.Array, kernel: Kernel) -> jax.Array:
        planes = from_int4_rows(kernel) if isinstance(kernel, Int4RowsKernel) else kernel
        w_kn = dequantize_runtime(planes)
        expected = jnp.matmul(x.astype(jnp.float32), w_kn, precision=jax.lax.Precision.HIGHEST)
        y = int4_matmul_runtime(x, kernel, backend=backend).astype(jnp.float32)
        return jnp.linalg.norm(y - expected) / jnp.linalg.norm(expected)

    return float(error(x, kernel))


def time_shape(shape: Shape, speed: dict[str, float], backend: Backend, rehearse: bool, repeats: int) -> dict[str, Any]:
    """One product: its time, XLA's on bfloat16 weights, the floor, and whether it is right."""
    ran = ran_by(backend, rehearse)
    first = random_kernel(shape, 0, backend)
    packed_bytes, dense_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(first)), 2 * shape.k * shape.n
    copies, dense_copies = (2 if rehearse else max(2, int(COLD_BYTES // size) + 1) for size in (packed_bytes, dense_bytes))
    kernels = [first, *(random_kernel(shape, seed, backend) for seed in range(1, copies))]
    dense = [
        jax.random.normal(jax.random.key(seed), (shape.k, shape.n), jnp.bfloat16) / jnp.bfloat16(shape.k**0.5)
        for seed in range(dense_copies)
    ]
    x = jax.random.normal(jax.random.key(1), (shape.m, shape.k), jnp.bfloat16)
    outputs = [jnp.ones((shape.m, shape.n), jnp.bfloat16)] * 8

    def packed_product(x: jax.Array, kernel: Kernel) -> jax.Array:
        return int4_matmul_runtime(x, kernel, backend=ran)

    error = error_of(x, first, ran)
    steps = {
        "int4": (chained(jax.jit(packed_product)), x, kernels),
        "bf16": (chained(jnp.matmul), x, dense),
        "chain": (chained(lambda _, y: y), x, outputs),
    }
    times: dict[str, Slope] = slopes(steps, repeats)
    ours, theirs = (times[name].seconds - times["chain"].seconds for name in ("int4", "bf16"))
    moved = packed_bytes + x.nbytes + 2 * shape.m * shape.n
    floor = max(moved / speed["bytes_per_second"], shape.m * shape.k * shape.n / speed["macs_per_second"])
    return {
        "shape": str(shape),
        "k": shape.k,
        "n": shape.n,
        "m": shape.m,
        "error": error,
        "right": bool(error < ERROR_OF_TIMED),
        "int4_us": ours * 1e6,
        "bf16_us": theirs * 1e6,
        "times_as_fast": theirs / ours,
        "floor_us": floor * 1e6,
        "of_floor": floor / ours,
        "slopes": {name: slope._asdict() for name, slope in times.items()},
        "profiled_us": device_times(lambda: jax.jit(packed_product)(x, first)),
        "tiling": str(tiling_of(shape.m, shape.layout, x.dtype)) if backend == "triton" else "",
    }


def times(record: Record, shapes: tuple[Shape, ...], backend: Backend, rehearse: bool, repeats: int) -> bool:
    """Times all shapes, also after one has failed; whether all ran and were right."""
    speed = ceilings(rehearse)
    record.put(ceilings=speed)
    all_right = True
    for shape in shapes:
        if backend == "mosaic" and shape.m > mosaic.MAX_M:
            continue
        try:
            row = time_shape(shape, speed, backend, rehearse, repeats)
        except Exception as error:
            row = {"shape": str(shape), "right": False, "error": f"{type(error).__name__}: {error}"[:2000]}
        all_right &= row["right"]
        record.add("times", row)
    return all_right


def main() -> None:
    parser = arguments(__doc__, ("check", "ceilings", "time_first", "time"))
    parser.add_argument("--backend", choices=["triton", "mosaic"], default="triton")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the checks' operands")
    args = parser.parse_args()
    require_gpu(args.rehearse)
    record = Record(args.record)
    if args.part == "ceilings":
        record.put(**ceilings(args.rehearse))
        return
    if args.part == "check":
        right = check(record, args.backend, args.rehearse, args.seed)
    else:
        listed = shapes_of("rehearse" if args.rehearse else args.part)
        later = [shape for shape in listed if args.part != "time" or args.rehearse or "time_first" not in shape.uses]
        small = tuple(shape for shape in later if not args.rehearse or (shape.sym and not shape.reordered))
        right = times(record, small, args.backend, args.rehearse, 2 if args.rehearse else args.repeats)
    if not right:
        raise SystemExit("a product is wrong or did not run: see the rows above that are not right")


if __name__ == "__main__":
    main()
