"""Every kernel, and every entry of the tuning table, compiled for an H200 that need not be there.

    make gpu-compile                                     # compares with the recorded snapshot, and fails where they differ
    PYTHONPATH=.aot:. .venv/bin/python benchmarks/gpu/compile_kernels.py --record

Per kernel: registers and stack a thread from the cubin (a kernel that spills has a stack), and from its PTX the matrix
instructions, asynchronous copies, and integer operations per code in the loop over K. The snapshot is of one release of jax and
is compared on that one alone; that nothing spills is checked on all. No GPU runs: this says how kernels compile, nothing of how
fast they are.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
DUMP = tempfile.mkdtemp()
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={DUMP} --xla_dump_emitter_re=.*"

import aot  # noqa: E402
import aot_kernels  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from common import RESULTS, circumstances, write_result  # noqa: E402

from pallas_kernels import gptq_block as block_module  # noqa: E402
from pallas_kernels import int4_decode  # noqa: E402
from pallas_kernels.int4_decode import Tiling  # noqa: E402
from pallas_kernels.planes import TILE, Planes  # noqa: E402
from pallas_kernels.tuning import BUCKETS, rule, table  # noqa: E402

NAME = "gpu_compile"
OPERATIONS_PER_CODE = 1.5
REGISTERS = 255
_INTEGER = re.compile(
    r"^\s*(?:@%p\d+ )?(lop3|prmt|shr|shl|shf|and|or|xor|not|bfe|bfi|add\.s32|sub\.s32|mul\.lo|mad\.lo|cvt\.\w+\.[su]\d+)\b"
)
Case = tuple[str, Any, list[jax.ShapeDtypeStruct], int]


def matmul_case(name: str, m: int, layout: Planes, dtype: Any, zeros: bool, tiling: Tiling) -> Case:
    """A product of m rows; and the codes that a thread expands in one round of the loop over K."""
    rows = -(-layout.padded_k // layout.rows)
    shape = jax.ShapeDtypeStruct
    operands = [
        shape((m, layout.padded_k), dtype),
        shape((layout.tiles * layout.words, layout.padded_n), jnp.int32),
        shape((rows, layout.padded_n), jnp.bfloat16),
    ]
    operands += [shape((rows, layout.padded_n), jnp.int8)] if zeros else []

    def function(x: jax.Array, words: jax.Array, scales: jax.Array, *zero: jax.Array) -> jax.Array:
        return int4_decode.product(x, words, scales, zero[0] if zero else None, layout, tiling, interpret=False)

    return name, function, operands, TILE * tiling.columns // (32 * tiling.warps)


def block_case(rows: int, shared: bool, drifts: bool) -> Case:
    """The solver's inner loop for 4096 columns."""
    shape = jax.ShapeDtypeStruct
    of_scale = shape((1 if shared else rows, 4096), jnp.float32)
    square = shape((rows, rows), jnp.float32)
    operands = [shape((rows, 4096), jnp.float32), square, of_scale, of_scale, *([square] if drifts else [])]

    def function(*given: jax.Array) -> Any:
        return block_module.launched(*given, bits=4, interpret=False)

    return f"gptq_block, {rows} rows, shared {shared}, drift {drifts}", function, operands, 0


def cases() -> Iterator[Case]:
    """What is compiled."""
    for m in BUCKETS:
        for group, zeros, dtype in ((128, False, jnp.bfloat16), (128, True, jnp.bfloat16), (32, False, jnp.float16)):
            layout = Planes(k=4096, n=4096, bits=4, group_size=group)
            name = f"int4, M {m}, group {group}, zeros {zeros}, {jnp.dtype(dtype).name}"
            yield matmul_case(name, m, layout, dtype, zeros, rule(m, layout, dtype))
    layout = Planes(k=4096, n=4096, bits=4, group_size=128)
    for m in (1, 2, 4):
        tiling = Tiling(form="gemv", rows=m, columns=128 if m < 4 else 64, parts=4, warps=4, stages=4)
        yield matmul_case(f"int4, M {m}, gemv", m, layout, jnp.bfloat16, False, tiling)
    tiling = Tiling(form="planes", rows=16, columns=64, parts=4, warps=4, stages=4, atomics=True)
    yield matmul_case("int4, M 16, atomics", 16, layout, jnp.bfloat16, False, tiling)
    whole = Planes(k=4096, n=4096, bits=4, group_size=4096)
    yield matmul_case("int4, M 16, one group", 16, whole, jnp.bfloat16, True, rule(16, whole, jnp.bfloat16))
    for m in (16, 128):
        yield matmul_case(f"int4, M {m}, float32", m, layout, jnp.float32, False, rule(m, layout, jnp.float32))
    for m, dtype in ((1, jnp.bfloat16), (16, jnp.float16), (64, jnp.bfloat16)):
        bytes_of = Planes(k=4096, n=4096, bits=8, group_size=128)
        yield matmul_case(f"int8, M {m}, {jnp.dtype(dtype).name}", m, bytes_of, dtype, True, rule(m, bytes_of, dtype))
    for rows, shared, drifts in (
        (128, True, False),
        (128, False, False),
        (128, True, True),
        (32, True, False),
        (64, True, False),
    ):
        yield block_case(rows, shared, drifts)
    for key, tiling in table().items():
        _, _, k, n, group, bits, dtype, bucket = key.split(" | ")
        layout = Planes(k=int(k), n=int(n), bits=int(bits), group_size=int(group))
        yield matmul_case(f"table: {key}", int(bucket), layout, jnp.dtype(dtype), False, tiling)


def measured(case: Case, target: Any) -> dict[str, Any]:
    """How one case compiles: of its own kernel, not of what XLA adds."""
    _, function, operands, codes = case
    for old in Path(DUMP).iterdir():
        old.unlink()
    executable = aot.compiled(function, operands, target)
    own = {
        name: facts for name, facts in aot_kernels.kernels(executable).items() if name.startswith(("int4", "int8", "gptq_block"))
    }
    if len(own) != 1:
        raise SystemExit(
            f"{case[0]}: expected one kernel of ours in the program, found {list(own) or list(aot_kernels.kernels(executable))}"
        )
    ptx = next(text for path in Path(DUMP).rglob("*.ptx") if f".entry {next(iter(own))}" in (text := path.read_text()))
    counts = {name: len(re.findall(rf"\b{name}\.", ptx)) for name in ("wgmma.mma_async", "mma.sync", "cp.async.c[ag]")}
    found = {**next(iter(own.values())), **{name: count for name, count in counts.items() if count}}
    if codes:
        found["integer_operations_per_code"] = round(integer_operations(ptx) / codes, 3)
    return found


def integer_operations(ptx: str) -> int:
    """Integer operations in the longest loop of a kernel, from a label to the branch back to it."""
    lines = ptx.splitlines()
    labels = {line.split(":")[0].strip(): number for number, line in enumerate(lines) if re.match(r"\$L\w+:", line)}
    loops = [
        (labels[target.group(1)], number)
        for number, line in enumerate(lines)
        if (target := re.search(r"\bbra(?:\.uni)?\s+(\$L\w+);", line)) and labels.get(target.group(1), number) < number
    ]
    if not loops:
        return 0
    start, stop = max(loops, key=lambda loop: loop[1] - loop[0])
    return sum(bool(_INTEGER.match(line)) for line in lines[start:stop])


def problems(name: str, found: dict[str, Any]) -> list[str]:
    """What no kernel may do, whatever the snapshot says."""
    wrong = []
    if found.get("stack", 0):
        wrong.append(f"{name}: {found['stack']} bytes of stack, so registers spill")
    if found.get("registers", 0) > REGISTERS:
        wrong.append(f"{name}: {found['registers']} registers")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write the snapshot instead of comparing with it")
    args = parser.parse_args()
    target, started = aot.topology(1), time.monotonic()
    found = {case[0]: measured(case, target) for case in cases()}
    for name, facts in found.items():
        print(f"{name:60}", *(f"{key} {value}" for key, value in facts.items()))
    wrong = [sentence for name, facts in found.items() for sentence in problems(name, facts)]
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
