"""Time and host memory of loading a checkpoint: how much more than reading its file.

    python benchmarks/bench_load.py

A random Llama of 8 blocks (1024 wide, 2816 inner, float16: 278 MB), float, and the same quantized to 4 bit by rounding with an
asymmetric grid (GPTQ v2). Each is measured in processes of its own, one after the other, the files in the page cache: one reads
the files through a buffer of 1 MiB; one loads the folder; one loads it and then reads every byte of every leaf in place, as a run
does. Reported are the medians of five rounds, and the peak resident set above that of a process that only imports. Pages of a
mapped file count as resident, although the system may drop them at any time.
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

SHAPE = {"blocks": 8, "width": 1024, "inner": 2816, "heads": 8, "vocab": 32768, "max_positions": 2048}
ROUNDS = 5

JOB = """
import json, resource, sys, time
from pathlib import Path
import jax, numpy as np
import jgptq
from converters import load_hf
from jgptq import tinycode

job, folder = sys.argv[1], Path(sys.argv[2])
load_hf(tinycode.FOLDER)  # imports and traces what the first call of a process does
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.perf_counter()
if job == "file":
    buffer = bytearray(2**20)
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                total += int(np.frombuffer(buffer, np.uint64).max() > 0) + count
else:
    leaves = jax.tree.leaves(load_hf(folder))
    for leaf in leaves if job == "load and read" else []:
        flat = (leaf.T if leaf.ndim == 2 and leaf.flags.f_contiguous else leaf).reshape(-1).view(np.uint8)
        flat[: flat.size // 8 * 8].view(np.uint64).max()
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "bytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) * 1024}))
"""


def measure(job: str, folder: Path) -> dict[str, float]:
    """Seconds, and bytes above those of the imports, of a job in a process of its own."""
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", JOB, job, str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(root)})
    return json.loads(done.stdout)


def compare(folder: Path) -> dict[str, float]:
    """One folder: the ratios of loading to reading its files."""
    nbytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    rounds = [{job: measure(job, folder) for job in ("file", "load", "load and read")} for _ in range(ROUNDS)]

    def median(job: str, what: str) -> float:
        return statistics.median(one[job][what] for one in rounds)

    file = median("file", "seconds")
    return {
        "file_bytes": nbytes,
        "read_file_seconds": file,
        "load_seconds": median("load", "seconds"),
        "load_over_read_file": median("load", "seconds") / file,
        "load_and_read_over_read_file": median("load and read", "seconds") / file,
        "load_bytes_over_file_bytes": median("load", "bytes") / nbytes,
        "load_and_read_bytes_over_file_bytes": median("load and read", "bytes") / nbytes,
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
