"""Peak host memory of quantizing a checkpoint: it depends on the size of a block and not on their number.

    python benchmarks/bench_memory.py

Two random Llamas of the same block (2048 wide, 5632 inner, bfloat16: 103 MB), one of 5 blocks and one of 20 (2 GB), each
quantized to 4 bit, in its own dtype, in a process of its own that streams finished blocks into the output folder. If memory is
independent of their number, both peaks are the same. Reported are the peak resident set of the process, and that of a process
that only imports jgptq and compiles nothing.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import circumstances, random_llama, random_tokens, write_result

HERE = Path(__file__).parent
BLOCK = {"width": 2048, "inner": 5632, "heads": 16, "vocab": 4096, "max_positions": 2048}
SAMPLES, SEQ_LEN = 16, 128
IMPORT_ONLY = "import resource, jgptq, converters; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"


def measure(blocks: int, work: Path) -> dict[str, float]:
    """Quantizes a checkpoint of this depth and returns its sizes, seconds and peak memory."""
    model = random_llama(work / f"model{blocks}", blocks=blocks, dtype="bfloat16", **BLOCK)
    nbytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    tokens = random_tokens(work / "tokens.npy", SAMPLES, SEQ_LEN, BLOCK["vocab"])
    command = [sys.executable, str(HERE / "job_jgptq.py"), str(model), str(tokens), str(work / "out"), str(work / "result.json")]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(HERE.parent)})
    job = json.loads((work / "result.json").read_text())
    return {
        "blocks": blocks,
        "checkpoint_bytes": nbytes,
        "peak_rss_bytes": job["peak_rss_bytes"],
        "seconds": job["seconds"]["total"],
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        runs = [measure(blocks, Path(scratch)) for blocks in (5, 20)]
    base = subprocess.run([sys.executable, "-c", IMPORT_ONLY], check=True, capture_output=True, text=True, cwd=HERE.parent)
    block_bytes = (runs[1]["checkpoint_bytes"] - runs[0]["checkpoint_bytes"]) // 15
    summary = {
        "import_only_rss_bytes": int(base.stdout),
        "block_bytes": block_bytes,
        "peak_of_20_over_peak_of_5_blocks": runs[1]["peak_rss_bytes"] / runs[0]["peak_rss_bytes"],
        "peak_above_import_in_blocks": (runs[1]["peak_rss_bytes"] - int(base.stdout)) / block_bytes,
        "peak_over_checkpoint": runs[1]["peak_rss_bytes"] / runs[1]["checkpoint_bytes"],
    }
    print(json.dumps({"summary": summary, "runs": runs}, indent=1))
    job = {"block": BLOCK, "samples": SAMPLES, "seq_len": SEQ_LEN, "bits": 4, "group_size": 128, "dtype": "auto"}
    print("wrote", write_result("memory_cpu", {**circumstances(), "job": job, "summary": summary, "runs": runs}))


if __name__ == "__main__":
    main()
