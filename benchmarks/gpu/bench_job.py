"""Seconds of the whole job on the device: load, quantize and save a random Llama of 12 blocks, 768 wide, at each preset.

    python benchmarks/gpu/bench_job.py

The model and tokens of `benchmarks/bench_quantize.py`; bfloat16 activations, 4 bit, group 128. Every job is a process of its own:
seconds hold its compilation, not its imports.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import paths  # isort: skip
from common import random_llama, random_tokens
from records import Record, arguments, require_gpu

MODEL = {"blocks": 12, "width": 768, "inner": 2048, "heads": 12, "vocab": 4096, "max_positions": 2048}
SMALL = {"blocks": 1, "width": 128, "inner": 256, "heads": 2, "vocab": 512, "max_positions": 256}
PRESETS = ("fast", "balanced", "best")


def main() -> None:
    args = arguments(__doc__).parse_args()
    require_gpu(args.rehearse)
    record, job = Record(args.record), paths.ROOT / "benchmarks" / "job_jgptq.py"
    model_of, samples, length = (SMALL, 4, 64) if args.rehearse else (MODEL, 32, 512)
    record.put(model=model_of, samples=samples, seq_len=length)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = random_llama(work / "model", **model_of)
        tokens, result = random_tokens(work / "tokens.npy", samples, length, model_of["vocab"]), work / "result.json"
        for preset in PRESETS[: 1 if args.rehearse else None]:
            command = [sys.executable, str(job), str(model), str(tokens), str(work / "out"), str(result)]
            ran = subprocess.run([*command, "--dtype", "bfloat16", "--preset", preset], check=False, env=paths.environment())
            record.add("jobs", {"preset": preset, **(json.loads(result.read_text()) if ran.returncode == 0 else {})})
            if ran.returncode:
                raise SystemExit(f"the job with preset {preset} failed: see its output above")


if __name__ == "__main__":
    main()
