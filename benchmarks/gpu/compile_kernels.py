"""Every kernel, and every entry of the tuning table, compiled for an H200 that need not be there.

    make gpu-compile                                     # compares with the recorded snapshot, and fails where they differ
    PYTHONPATH=.aot:. .venv/bin/python benchmarks/gpu/compile_kernels.py --record

Per kernel, from the assembler: registers and bytes spilled a thread, matrix instructions, asynchronous copies, and for the decode
kernels integer operations per code in the loop over K, those of loads and their addresses included. The snapshot is of one
release of jax and is compared on that one alone; that nothing spills, and that 4-bit codes of a symmetric grid cost at most 1.5
integer operations, is checked on all. No GPU runs: this says how kernels compile, nothing of how fast they are.
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import aot_kernels  # isort: skip  # before jax
import aot
import jax
import jax.numpy as jnp
from common import RESULTS, circumstances, write_result

from jgptq.settings.solver import Scale
from jgptq.solver.grid import search_grid
from pallas_kernels import Given, Searched
from pallas_kernels.gptq_block.interface import launched
from pallas_kernels.int4_matmul import mosaic, triton
from pallas_kernels.int4_matmul.planes import TILE, Planes
from pallas_kernels.int4_matmul.rows import Rows, RowsKernel
from pallas_kernels.int4_matmul.triton import Tiling
from pallas_kernels.int4_matmul.tuning import BUCKETS, rule, table

NAME = "gpu_compile"
OPERATIONS_PER_CODE = 1.5
_S = jax.ShapeDtypeStruct


class Case(NamedTuple):
    """A program with one kernel of ours."""

    name: str
    function: Any
    operands: list[jax.ShapeDtypeStruct]
    kernel: str  # how its name begins
    codes: int = 0  # that a thread expands in one round of the loop over K
    limited: bool = False  # whether their cost in integer operations is


def product_case(name: str, m: int, layout: Planes, dtype: Any, zeros: bool, tiling: Tiling) -> Case:
    """A product of m rows by the Triton kernel."""
    shape = (-(-layout.padded_k // layout.rows), layout.padded_n)
    operands = [_S((m, layout.padded_k), dtype), _S((layout.tiles * layout.words, layout.padded_n), jnp.int32)]
    operands += [_S(shape, jnp.bfloat16), *([_S(shape, jnp.int8)] if zeros else [])]

    def function(x: jax.Array, words: jax.Array, scales: jax.Array, *zero: jax.Array) -> jax.Array:
        return triton.product(x, words, scales, zero[0] if zero else None, layout, tiling, interpret=False)

    codes = TILE * tiling.columns // (32 * tiling.warps)
    whole = layout.rows >= TILE and not zeros
    limited = layout.bits == 4 and tiling.form != "gemv" and dtype != jnp.float32 and whole and m <= 32
    return Case(name, function, operands, f"int{layout.bits}_", codes, limited)


def mosaic_case(m: int, group: int, dtype: Any, zeros: bool) -> Case:
    """The same through Mosaic GPU."""
    layout = Rows(k=4096, n=4096, bits=4, group_size=group)
    shape = (4096 // layout.rows, 4096)
    operands = [_S((m, 4096), dtype), _S((4096, 4096), jnp.int4), _S(shape, jnp.bfloat16)]
    operands += [_S(shape, jnp.int8)] if zeros else []

    def function(x: jax.Array, codes: jax.Array, scales: jax.Array, *zero: jax.Array) -> jax.Array:
        kernel = RowsKernel(codes=codes, scales=scales, zeros=zero[0] if zero else None, order=None, layout=layout)
        return mosaic.product(x, kernel)

    name = f"mosaic, M {m}, group {group}, zeros {zeros}, {jnp.dtype(dtype).name}"
    return Case(name, function, operands, "int4_mosaic")


def block_case(rows: int, shared: bool, drifts: bool) -> Case:
    """The solver's inner loop for 4096 columns, on grids that are given."""
    of_scale = _S((1 if shared else rows, 4096), jnp.float32)
    square = _S((rows, rows), jnp.float32)
    operands = [_S((rows, 4096), jnp.float32), square, of_scale, of_scale, *([square] if drifts else [])]

    def function(w_rn: jax.Array, u_rr: jax.Array, scale_rn: jax.Array, zero_rn: jax.Array, *drift: jax.Array) -> Any:
        return launched(w_rn, u_rr, Given(scale_rn, zero_rn), *drift, bits=4, interpret=False)

    return Case(f"gptq_block, {rows} rows, shared {shared}, drift {drifts}", function, operands, "gptq_block")


def searching_case(of_group: int, sym: bool, scale: Scale, drifts: bool) -> Case:
    """The same with the solver's search of grids at the start of each group."""
    square = _S((128, 128), jnp.float32)
    operands = [_S((128, 4096), jnp.float32), square, _S((128,), jnp.float32), *([square] if drifts else [])]

    search = functools.partial(search_grid, bits=4, sym=sym, scale=scale)

    def function(w_rn: jax.Array, u_rr: jax.Array, weight_r: jax.Array, *drift: jax.Array) -> Any:
        return launched(w_rn, u_rr, Searched(weight_r, of_group, search), *drift, bits=4, interpret=False)

    return Case(f"gptq_block, groups of {of_group}, sym {sym}, scale {scale}, drift {drifts}", function, operands, "gptq_block")


def cases() -> Iterator[Case]:
    """What is compiled."""
    for group, zeros, dtype in ((128, False, jnp.bfloat16), (128, True, jnp.bfloat16), (32, False, jnp.float16)):
        layout = Planes(k=4096, n=4096, bits=4, group_size=group)
        # Buckets that are cut up alike are one kernel.
        for tiling, m in {rule(m, layout, dtype): m for m in BUCKETS}.items():
            name = f"int4, M {m}, group {group}, zeros {zeros}, {jnp.dtype(dtype).name}"
            yield product_case(name, m, layout, dtype, zeros, tiling)
    layout = Planes(k=4096, n=4096, bits=4, group_size=128)
    for m in (1, 2, 4):
        tiling = Tiling(form="gemv", rows=m, columns=128 if m < 4 else 64, parts=4, warps=4, stages=4)
        yield product_case(f"int4, M {m}, gemv", m, layout, jnp.bfloat16, False, tiling)
    tiling = Tiling(form="planes", rows=16, columns=64, parts=4, warps=4, stages=4, atomics=True)
    yield product_case("int4, M 16, atomics", 16, layout, jnp.bfloat16, False, tiling)
    whole = Planes(k=4096, n=4096, bits=4, group_size=4096)
    yield product_case("int4, M 16, one group", 16, whole, jnp.bfloat16, True, rule(16, whole, jnp.bfloat16))
    for m in (16, 128):
        yield product_case(f"int4, M {m}, float32", m, layout, jnp.float32, False, rule(m, layout, jnp.float32))
    for m, dtype in ((1, jnp.bfloat16), (16, jnp.float16), (64, jnp.bfloat16)):
        bytes_of = Planes(k=4096, n=4096, bits=8, group_size=128)
        yield product_case(f"int8, M {m}, {jnp.dtype(dtype).name}", m, bytes_of, dtype, True, rule(m, bytes_of, dtype))
    for m, group, dtype, zeros in (
        (1, 128, jnp.bfloat16, False),
        (16, 32, jnp.bfloat16, True),
        (16, 64, jnp.float16, False),
        (64, 128, jnp.bfloat16, False),
        (128, 128, jnp.bfloat16, False),
    ):
        yield mosaic_case(m, group, dtype, zeros)
    for rows, shared, drifts in (
        (128, True, False),
        (128, False, False),
        (128, True, True),
        (32, True, False),
        (64, True, False),
    ):
        yield block_case(rows, shared, drifts)
    for of_group, sym, scale, drifts in (
        (128, True, "hessian", False),
        (32, False, "hessian", True),
        (64, True, "mse", False),
        (32, True, "minmax", False),
    ):
        yield searching_case(of_group, sym, scale, drifts)
    for key, tiling in table().items():
        _, _, k, n, group, bits, dtype, bucket = key.split(" | ")
        layout = Planes(k=int(k), n=int(n), bits=int(bits), group_size=int(group))
        yield product_case(f"table: {key}", int(bucket), layout, jnp.dtype(dtype), False, tiling)


def problems(case: Case, found: dict[str, Any]) -> list[str]:
    """What no kernel may do, whatever the snapshot says."""
    wrong = [f"{case.name}: {found['spilled_bytes']} bytes spilled"] if found["spilled_bytes"] else []
    if case.limited and found["integer_operations_per_code"] > OPERATIONS_PER_CODE:
        wrong.append(f"{case.name}: {found['integer_operations_per_code']} integer operations per code")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write the snapshot instead of comparing with it")
    args = parser.parse_args()
    target, started = aot.topology(1), time.monotonic()
    found, wrong = {}, []
    for case in cases():
        found[case.name] = aot_kernels.facts(case.function, case.operands, target, case.kernel, case.codes)
        wrong += problems(case, found[case.name])
        print(f"{case.name:52}", *(f"{key} {value}" for key, value in found[case.name].items()), flush=True)
    path = RESULTS / f"{NAME}.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    if not args.record and old.get("versions", {}).get("jax") == jax.__version__:
        wrong += [
            f"{name}: recorded {old['kernels'].get(name)}, now {found.get(name)}"
            for name in sorted({*old["kernels"], *found})
            if old["kernels"].get(name) != found.get(name)
        ]
    print(f"{len(found)} kernels in {time.monotonic() - started:.0f} s")
    if wrong:
        raise SystemExit("\n".join([*wrong, "If that is as it should be, record it: --record"]))
    if args.record:
        print("wrote", write_result(NAME, {**circumstances(), "kernels": found}))


if __name__ == "__main__":
    main()
