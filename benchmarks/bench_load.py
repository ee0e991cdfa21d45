"""Time and host memory of loading a checkpoint: how much more than reading its file.

    python benchmarks/bench_load.py

A random Llama of 4 blocks (2048 wide, 5632 inner, float16: 444 MB), float, and the same quantized to 4 bit by rounding with an
asymmetric grid (GPTQ v2). A process of its own reads the files through a buffer of 1 MiB, then loads the folder, then reads every
byte of every leaf in place, as a run does; the files are in the page cache. Reported are, of four processes, the shortest time of
each step, and the median by which it raised the peak resident set. Pages of a mapped file count as resident, although the system
may drop them at any time.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

from common import circumstances, random_llama, write_result

import jgptq
from converters import load_hf, save_hf

SHAPE = {"blocks": 4, "width": 2048, "inner": 5632, "heads": 16, "vocab": 8192, "max_positions": 2048}
ROUNDS = 4

JOB = """
import json, re, sys, time
from pathlib import Path
import jax, numpy as np
from converters import load_hf
from jgptq import tinycode

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def read_file():
    buffer = bytearray(2**20)
    words = np.frombuffer(buffer, np.uint64)
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                words.max()

def read_leaves():
    for leaf in jax.tree.leaves(decoder):
        flat = (leaf.T if leaf.flags.f_contiguous else leaf).reshape(-1).view(np.uint8)
        flat[: flat.size // 8 * 8].view(np.uint64).max()

def load():
    global decoder
    decoder = load_hf(folder)

folder = Path(sys.argv[1])
load_hf(tinycode.FOLDER)  # imports what the first call of a process imports
result = {}
for step in (read_file, load, read_leaves):
    before, started = peak(), time.perf_counter()
    step()
    result[step.__name__] = {"seconds": time.perf_counter() - started, "bytes": peak() - before}
print(json.dumps(result))
"""


def measure(folder: Path) -> dict[str, dict[str, float]]:
    """Seconds and growth of the peak resident set of each step, in a process of its own."""
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", JOB, str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(root)})
    return json.loads(done.stdout)


def compare(folder: Path) -> dict[str, float]:
    """One folder: loading against reading its files."""
    nbytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    rounds = [measure(folder) for _ in range(ROUNDS)]
    seconds = {step: min(one[step]["seconds"] for one in rounds) for step in rounds[0]}
    grown = {step: statistics.median(one[step]["bytes"] for one in rounds) for step in rounds[0]}
    whole = seconds["load"] + seconds["read_leaves"]
    return {
        "file_bytes": nbytes,
        "read_file_seconds": seconds["read_file"],
        "load_seconds": seconds["load"],
        "load_and_read_seconds": whole,
        "load_and_read_over_read_file": whole / seconds["read_file"],
        "load_bytes_over_file": grown["load"] / nbytes,
        "load_and_read_bytes_over_file": (grown["load"] + grown["read_leaves"]) / nbytes,
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of readers that refuse asymmetric grids
        model = random_llama(Path(scratch) / "float", **SHAPE)
        quantized, _ = jgptq.quantize(load_hf(model), method="rtn", sym=False, progress=False)
        packed = save_hf(quantized, Path(scratch) / "gptq_v2", "gptq_v2")
        runs = {"float": compare(model), "gptq_v2": compare(packed)}
    print(json.dumps(runs, indent=1))
    print("wrote", write_result("load_cpu", {**circumstances(), "shape": SHAPE, "rounds": ROUNDS, "runs": runs}))


if __name__ == "__main__":
    main()
