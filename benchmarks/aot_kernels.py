"""How a kernel compiles: its PTX as the compiler of the topology writes it, and what ptxas says of it.

To be imported before jax: it sets in the environment where the PTX is written.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_DUMP = Path(tempfile.mkdtemp())
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={_DUMP} --xla_dump_emitter_re=.*"
os.environ |= {"MOSAIC_GPU_DUMP_TO": str(_DUMP), "MOSAIC_GPU_DUMP_PTX": "1"}
# Triton takes a stack trace with what it dumps; naming its frames would take most of the time.
os.environ["LLVM_DISABLE_SYMBOLIZATION"] = "1"

import aot  # noqa: E402

_COUNTED = {"HGMMA": "wgmma", "HMMA": "mma", "LDGSTS": "copies", "UTMALDG": "bulk_copies"}
_INTEGER = ("LOP3", "PRMT", "SHF", "IADD3", "VIADD", "LEA", "ISETP", "SEL", "VIMNMX", "I2FP", "I2F", "IMAD")


def facts(function: Callable[..., Any], operands: list[Any], target: Any, name: str, codes: int) -> dict[str, Any]:
    """What is known of one kernel of a program once it is compiled.

    Args:
      function: the program.
      operands: its operands, pytrees of shapes and dtypes.
      target: of `aot.topology`.
      name: how the kernel's name begins.
      codes: how many of them a thread expands in one round of its longest loop; 0 where that is not asked.

    Returns:
      Registers and bytes spilled a thread; matrix instructions and asynchronous copies; integer operations per code.
    """
    for old in _DUMP.iterdir():
        old.unlink()
    aot.compiled(function, operands, target)
    ptx = [text for path in _DUMP.rglob("*.ptx") if re.search(rf"\.entry {name}", text := path.read_text())]
    if len(ptx) != 1:
        raise SystemExit(f"expected the PTX of one kernel {name}, found {len(ptx)} in {[path.name for path in _DUMP.iterdir()]}")
    result, sass = _assembled(ptx[0], name)
    counted = {key: sum(_opcode(line) == opcode for line in sass) for opcode, key in _COUNTED.items()}
    result |= {key: count for key, count in counted.items() if count}
    return result if codes == 0 else {**result, "integer_operations_per_code": round(integer_operations(sass) / codes, 2)}


def _assembled(ptx: str, name: str) -> tuple[dict[str, int], list[str]]:
    """What the assembler says of a kernel, and its instructions."""
    path, cubin = _DUMP / "kernel.in", _DUMP / "kernel.out"
    path.write_text(ptx)
    command = [_tool("ptxas"), "-arch=sm_90a", "-v", str(path), "-o", str(cubin)]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    of_kernel = re.search(
        rf"entry function '{name}.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+)",
        said,
        re.DOTALL,
    )
    if of_kernel is None:
        raise SystemExit(f"ptxas says nothing of {name}:\n{said}")
    stack, stores, loads, registers = map(int, of_kernel.groups())
    sass = subprocess.run([_tool("nvdisasm"), "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    return {"registers": registers, "spilled_bytes": stack + stores + loads}, sass.splitlines()


def _tool(name: str) -> str:
    """A program of NVIDIA's, from the packages of the compiler."""
    programs = [place for entry in sys.path for place in Path(entry).glob(f"nvidia/cu*/bin/{name}")]
    if not programs:
        raise SystemExit(f"{name} is missing: make .aot/ready, and run with PYTHONPATH=.aot")
    programs[0].chmod(0o755)
    return str(programs[0])


def _opcode(line: str) -> str:
    """LOP3 of `/*0a30*/  @P0 LOP3.LUT R0, R1, ...`, or nothing."""
    match = re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", line)
    return match[1] if match else ""


def integer_operations(sass: list[str]) -> int:
    """Integer operations in the longest loop of a kernel, from a label to the branch back to it; moves are not counted."""
    labels = {label[1]: number for number, line in enumerate(sass) if (label := re.match(r"(\.L\w+):", line.strip()))}
    loops = [
        (labels[target], number)
        for number, line in enumerate(sass)
        if (branch := re.search(r"\bBRA\b.*`\((\.L\w+)\)", line)) and labels.get(target := branch[1], number) < number
    ]
    if not loops:
        return 0
    start, stop = max(loops, key=lambda loop: loop[1] - loop[0])
    return sum(_opcode(line) in _INTEGER and "IMAD.MOV" not in line for line in sass[start:stop])
