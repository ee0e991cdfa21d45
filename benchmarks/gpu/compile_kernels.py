"""Every kernel, and every entry of the tuning table, compiled for an H200 that need not be there.

    make gpu-compile                                     # compares with the recorded snapshot, and fails where they differ
    PYTHONPATH=.aot python benchmarks/gpu/compile_kernels.py --record

Per kernel, from the assembler: registers and bytes spilled a thread, matrix instructions, asynchronous copies, and for the decode
kernels integer operations per code in the loop over K, those of loads and their addresses included. The snapshot is of one
release of jax and is compared on that one alone; that nothing spills, and that 4-bit codes of a symmetric grid cost at most 1.5
integer operations, is checked on all. No GPU runs: this says how kernels compile, nothing of how fast they are.
"""

import argparse
import json
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import paths  # isort: skip  # noqa: F401
import aot_kernels  # isort: skip  # before jax
import aot
import jax
import jax.numpy as jnp
from common import RESULTS, circumstances, write_result
from random_blocks import search_of

from pallas_kernels import Given, Int4RowsKernel, RuntimeKernel, Searched
from pallas_kernels.gptq_block import shapes as block_shapes
from pallas_kernels.gptq_block import triton as block_triton
from pallas_kernels.int4_matmul import mosaic, shapes, triton
from pallas_kernels.int4_matmul.int4_rows import Int4Rows
from pallas_kernels.int4_matmul.runtime import TILE
from pallas_kernels.int4_matmul.triton import Tiling
from pallas_kernels.int4_matmul.tuning import rule, table

NAME = "gpu_compile"
OPERATIONS_PER_CODE = 1.5
GEMV = {
    m: Tiling(form="gemv", block_m=m, block_n=block_n, split_k=4, num_warps=4, num_stages=4)
    for m, block_n in ((1, 128), (2, 128), (4, 64))
}
ATOMICS = Tiling(form="planes", block_m=16, block_n=64, split_k=4, num_warps=4, num_stages=4, atomics=True)
_S = jax.ShapeDtypeStruct


class Case(NamedTuple):
    """A program with one kernel of ours."""

    name: str
    function: Any
    operands: list[Any]
    kernel: str  # how its name begins
    codes: int = 0  # that a thread expands in one round of the loop over K
    limited: bool = False  # whether their cost in integer operations is


def _scales(layout: Any, sym: bool) -> tuple[Any, Any]:
    """Scales and zero points."""
    shape = (layout.scale_count, layout.padded_n)
    return _S(shape, jnp.bfloat16), None if sym else _S(shape, jnp.int8)


def triton_case(shape: shapes.Shape, tiling: Tiling, remark: str = "") -> Case:
    """A product by the Triton kernel."""
    layout, dtype = shape.layout, jnp.dtype(shape.dtype)
    scales, zeros = _scales(layout, shape.sym)
    words = _S((layout.tiles * layout.words, layout.padded_n), jnp.int32)
    kernel = RuntimeKernel(qweight=words, scales=scales, zeros=zeros, row_order=None, layout=layout)

    def function(x: jax.Array, kernel: RuntimeKernel) -> jax.Array:
        return triton.product(x, kernel, tiling, interpret=False)

    codes = TILE * tiling.block_n // (32 * tiling.num_warps)
    whole = layout.scale_rows >= TILE and shape.sym
    limited = layout.bits == 4 and tiling.form != "gemv" and dtype != jnp.float32 and whole and shape.m <= 32
    operands = [_S((shape.m, layout.padded_k), dtype), kernel]
    return Case(f"{shape}{remark}", function, operands, f"int{layout.bits}_", codes, limited)


def mosaic_case(shape: shapes.Shape) -> Case:
    """A product by the kernel in Mosaic GPU."""
    layout = Int4Rows(k=shape.k, n=shape.n, bits=shape.bits, group_size=shape.group_size)
    scales, zeros = _scales(layout, shape.sym)
    codes = _S((layout.padded_n, layout.padded_k), jnp.int4)
    kernel = Int4RowsKernel(codes=codes, scales=scales, zeros=zeros, row_order=None, layout=layout)
    operands = [_S((shape.m, layout.padded_k), jnp.dtype(shape.dtype)), kernel]
    return Case(f"{shape}, mosaic", lambda x, kernel: mosaic.product(x, kernel), operands, "int4_mosaic")


def block_case(shape: block_shapes.Shape) -> Case:
    """The solver's inner loop, on grids that are given or searched."""
    square = _S((shape.rows, shape.rows), jnp.float32)
    if shape.grids == "searched":
        grids: Any = Searched(_S((shape.rows,), jnp.float32), shape.group_size or shape.rows, search_of(shape))
    else:
        of_scale = _S((1 if shape.grids == "shared" else shape.rows, shape.n), jnp.float32)
        grids = Given(of_scale, of_scale)
    operands = [_S((shape.rows, shape.n), jnp.float32), square, grids, *([square] if shape.drift else [])]

    def function(*operands: Any) -> Any:
        return block_triton.launch(*operands, bits=shape.bits, interpret=False)

    return Case(f"gptq_block, {shape}", function, operands, "gptq_block")


def cases() -> Iterator[Case]:
    """What is compiled."""
    for shape in shapes.shapes_of("compile"):
        yield triton_case(shape, rule(shape.m, shape.layout, jnp.dtype(shape.dtype)))
    for m, tiling in GEMV.items():
        yield triton_case(shapes.Shape(m=m, k=4096, n=4096, uses=frozenset()), tiling, ", gemv")
    yield triton_case(shapes.Shape(m=16, k=4096, n=4096, uses=frozenset()), ATOMICS, ", atomics")
    yield from map(mosaic_case, shapes.shapes_of("compile_mosaic"))
    yield from map(block_case, block_shapes.shapes_of("compile"))
    for key, tiling in table().items():
        _, _, k, n, group_size, bits, dtype, bucket = key.split(" | ")
        sizes = {"m": int(bucket), "k": int(k), "n": int(n), "group_size": int(group_size), "bits": int(bits)}
        yield triton_case(shapes.Shape(**sizes, dtype=dtype, uses=frozenset()), tiling, f", tuned: {key}")


def problems(case: Case, counts: dict[str, Any]) -> list[str]:
    """What no kernel may do, whatever the snapshot says."""
    wrong = [f"{case.name}: {counts['spilled_bytes']} bytes spilled"] if counts["spilled_bytes"] else []
    if case.limited and counts["integer_operations_per_code"] > OPERATIONS_PER_CODE:
        wrong.append(f"{case.name}: {counts['integer_operations_per_code']} integer operations per code")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write the snapshot instead of comparing with it")
    args = parser.parse_args()
    target, started = aot.topology(1), time.monotonic()
    kernels, wrong = {}, []
    for case in cases():
        counts = aot_kernels.facts(case.function, case.operands, target, case.kernel, case.codes)
        kernels[case.name] = counts
        wrong += problems(case, counts)
        print(f"{case.name:76}", *(f"{key} {value}" for key, value in counts.items()), flush=True)
    path = RESULTS / f"{NAME}.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    if not args.record and old.get("versions", {}).get("jax") == jax.__version__:
        wrong += [
            f"{name}: recorded {old['kernels'].get(name)}, now {kernels.get(name)}"
            for name in sorted({*old["kernels"], *kernels})
            if old["kernels"].get(name) != kernels.get(name)
        ]
    print(f"{len(kernels)} kernels in {time.monotonic() - started:.0f} s")
    if wrong:
        raise SystemExit("\n".join([*wrong, "If that is as it should be, record it: --record"]))
    if args.record:
        print("wrote", write_result(NAME, {**circumstances(), "kernels": kernels}))


if __name__ == "__main__":
    main()
