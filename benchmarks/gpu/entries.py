"""What `run_all.py` runs, in its order: correctness before timing, the most telling first."""

import dataclasses
from pathlib import Path

HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One process with a time limit of its own."""

    name: str
    proves: str
    command: tuple[str, ...]  # a script and its arguments; the runner adds --record and, in a rehearsal, --rehearse
    seconds: float  # the limit
    correctness: bool = False  # whether the whole run fails where it does not pass


def _check(name: str, script: str, seconds: float, proves: str) -> Entry:
    return dataclasses.replace(_time(name, script, seconds, proves), correctness=True)


def _time(name: str, script: str, seconds: float, proves: str) -> Entry:
    path, *arguments = script.split()
    return Entry(name=name, proves=proves, command=(str(HERE / path), *arguments), seconds=seconds)


ENTRIES = (
    _check(
        "environment",
        "environment.py --target gpu_target_config.pbtxt",
        60,
        "device, versions and commit are known; the compiler's description of the device, to compile for it without it",
    ),
    _check("int4_check", "bench_int4_matmul.py check", 150, "int4 and int8 products are those of float64, at every shape"),
    _check("block_check", "bench_gptq_block.py check", 90, "the solver's inner loop gives the codes of plain JAX"),
    _check("solver_check", "check_solver.py", 100, "factor and codes are those of float64 and of the CPU"),
    _check("quantize_check", "check_model.py quantize", 150, "the embedded model quantized: perplexity and codes of the CPU"),
    _check("mosaic_check", "bench_int4_matmul.py check --backend mosaic", 60, "the same of the kernel in Mosaic GPU"),
    _time("ceilings", "bench_int4_matmul.py ceilings", 30, "bytes a second of a copy, operations of a bfloat16 matmul"),
    _time("int4_first", "bench_int4_matmul.py time_first", 240, "int4 products against bfloat16, three shapes, M of 1 to 128"),
    _time("block_time", "bench_gptq_block.py time", 50, "a block of the solver, the kernel against plain JAX"),
    _time("solve", "bench_gptq_block.py solve", 50, "a whole solve of 4096 x 4096; the target is 4 ms"),
    _time("demo", "check_model.py demo", 100, "GPTQ lies between float and round-to-nearest at 4, 3 and 2 bits"),
    _time("tune", "tune_int4_matmul.py --seconds 100", 120, "the quickest of at most ten tilings besides the rule's"),
    _time("mosaic_first", "bench_int4_matmul.py time_first --backend mosaic", 90, "the kernel in Mosaic GPU, as int4_first"),
    _time("solve_wide", "bench_gptq_block.py solve_wide", 50, "a whole solve of K = 14336, N = 4096; the target is 90 ms"),
    _time("job", "bench_job.py", 120, "load, quantize and save a random Llama of 12 blocks, at each preset"),
    _time("int4_later", "bench_int4_matmul.py time", 300, "int4 products at all other shapes and M"),
)
