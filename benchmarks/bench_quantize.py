"""The whole job against GPTQModel: seconds and peak memory on the same model and tokens, in turn, in one run.

    make interop-venv && python benchmarks/bench_quantize.py

A random Llama of 12 blocks, 768 wide, 2048 inner; 32 samples of 512 tokens; 4 bit, group 128, symmetric. Both jobs run in
processes of their own, one after the other, `--runs` times; quoted is the median of the ratios of neighbouring runs. Seconds
cover load, quantize and save, compilation included, imports not. GPTQModel is run in each of `--peer-dtypes`, for its default on
a CPU is bfloat16; the claim is made against the fastest.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import circumstances, random_llama, random_tokens, write_result

HERE = Path(__file__).parent
MODEL = {"blocks": 12, "width": 768, "inner": 2048, "heads": 12, "vocab": 4096, "max_positions": 2048}
SAMPLES, SEQ_LEN = 32, 512


def run(command: list[str], result: Path) -> dict[str, Any]:
    """Runs one job and reads what it measured."""
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(HERE.parent)}, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return json.loads(result.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--peer-python", default=str(HERE.parent / ".venv-interop/bin/python"))
    parser.add_argument("--peer-dtypes", nargs="+", default=["float32", "auto"])
    parser.add_argument("--no-peer", action="store_true", help="only time this project, on a machine without the peer")
    parser.add_argument("--name", default="quantize_cpu", help="name of the result")
    parser.add_argument("--peer-batch", type=int, default=8, help="GPTQModel's batch_size: samples run at once, as ours runs 8")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        model = random_llama(work / "model", **MODEL)
        tokens = random_tokens(work / "tokens.npy", SAMPLES, SEQ_LEN, MODEL["vocab"])
        result = work / "result.json"
        ours = [sys.executable, str(HERE / "job_jgptq.py"), str(model), str(tokens), str(work / "ours"), str(result)]
        peer = [args.peer_python, str(HERE / "peer_gptqmodel.py"), str(model), str(tokens), str(work / "peer"), str(result)]
        peer += ["--batch-size", str(args.peer_batch)]
        rounds = []
        for number in range(args.runs):
            entry = {"jgptq": run(ours, result)}
            for dtype in [] if args.no_peer else args.peer_dtypes:
                entry[f"gptqmodel {dtype}"] = run([*peer, "--dtype", dtype], result)
            rounds.append(entry)
            print(number, {name: (job["seconds"], job["peak_rss_bytes"]) for name, job in entry.items()}, flush=True)
    summary = {}
    for name in rounds[0]:
        if name != "jgptq":
            times = [entry[name]["seconds"]["total"] / entry["jgptq"]["seconds"]["total"] for entry in rounds]
            memory = [entry["jgptq"]["peak_rss_bytes"] / entry[name]["peak_rss_bytes"] for entry in rounds]
            summary[name] = {"times_as_fast": statistics.median(times), "memory_ratio": statistics.median(memory)}
    print(json.dumps(summary, indent=1))
    job = {"model": MODEL, "samples": SAMPLES, "seq_len": SEQ_LEN, "bits": 4, "group_size": 128}
    print("wrote", write_result(args.name, {**circumstances(), "job": job, "summary": summary, "rounds": rounds}))


if __name__ == "__main__":
    main()
