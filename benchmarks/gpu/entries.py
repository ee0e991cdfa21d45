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


def _entry(name: str, proves: str, command: str, seconds: float, correctness: bool = False) -> Entry:
    script, *arguments = command.split()
    path = str(HERE / script)
    return Entry(name=name, proves=proves, command=(path, *arguments), seconds=seconds, correctness=correctness)


ENTRIES = (
    _entry(
        "environment",
        "device, versions, commit; the compiler's description of the device, for compiling without it",
        "environment.py --target gpu_target_config.pbtxt",
        60,
        correctness=True,
    ),
    _entry(
        "int4_check",
        "int4 and int8 products are those of float64, every shape of the list",
        "bench_int4_matmul.py check",
        150,
        True,
    ),
    _entry("block_check", "the solver's inner loop gives the codes of plain JAX", "bench_gptq_block.py check", 90, True),
    _entry("int4_first", "times of int4 products at three shapes, M of 1 to 128", "bench_int4_matmul.py time_first", 200),
    _entry("solver_check", "factor and codes on the GPU against float64 and the CPU", "check_solver.py", 100, True),
    _entry(
        "quantize_check",
        "the embedded model quantized: codes and perplexity against the CPU",
        "check_model.py quantize",
        150,
        True,
    ),
    _entry("mosaic_check", "the kernel in Mosaic GPU is right", "bench_int4_matmul.py check --backend mosaic", 90, True),
    _entry(
        "ceilings", "bytes a second of a copy, multiply-adds a second of a bfloat16 matmul", "bench_int4_matmul.py ceilings", 40
    ),
    _entry("block_time", "times of a block, kernel and plain JAX", "bench_gptq_block.py time", 60),
    _entry("solve", "a whole solve of 4096 x 4096 (target 4 ms)", "bench_gptq_block.py solve", 60),
    _entry("demo", "the demonstration: GPTQ between float and round-to-nearest", "check_model.py demo", 120),
    _entry("tune", "the quickest of at most ten tilings a product", "tune_int4_matmul.py --seconds 120", 150),
    _entry("mosaic_first", "times of the kernel in Mosaic GPU", "bench_int4_matmul.py time_first --backend mosaic", 100),
    _entry("solve_wide", "a whole solve, K = 14336 (target 90 ms)", "bench_gptq_block.py solve_wide", 60),
    _entry("job", "seconds of the whole job at each preset", "bench_job.py", 150),
    _entry("int4_later", "times at all other shapes and M", "bench_int4_matmul.py time", 400),
)
