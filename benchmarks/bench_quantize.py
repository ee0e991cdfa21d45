"""A whole job against GPTQModel: seconds and peak memory on the same model and tokens, alternating in one run.

    make interop-venv && python benchmarks/bench_quantize.py

A random Llama of 12 blocks, 768 wide, 2048 inner, float16 on the disk; 32 samples of 512 tokens; 4 bit, group 128, symmetric.
Every job runs in a process of its own, one after the other, `--runs` times; the figures are medians of the ratios within a round,
preset by preset, with activations in the same dtype: float32, and bfloat16, the default of GPTQModel on a CPU. Seconds cover
load, quantize and save, compilation included, imports not.
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
PEER = "gptqmodel"


def run(command: list[str], result: Path) -> dict[str, Any]:
    """Runs one job and reads its result."""
    env = os.environ | {"PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=result.parent, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return json.loads(result.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--peer-python", default=str(HERE.parent / ".venv-interop/bin/python"))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="of activations, for both")
    parser.add_argument("--presets", nargs="+", default=["fast", "balanced"], help="of jgptq")
    parser.add_argument("--no-peer", action="store_true", help="only time this project, on a machine without the peer")
    parser.add_argument("--name", default="quantize_cpu", help="name of the result")
    parser.add_argument("--peer-batch", type=int, default=8, help="samples in a batch of GPTQModel")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        model = random_llama(work / "model", **MODEL)
        tokens = random_tokens(work / "tokens.npy", SAMPLES, SEQ_LEN, MODEL["vocab"])
        result = work / "result.json"
        inputs = [str(model), str(tokens)]
        ours = [sys.executable, str(HERE / "job_jgptq.py"), *inputs, str(work / "ours"), str(result), "--preset"]
        peer = [args.peer_python, str(HERE / "peer_gptqmodel.py"), *inputs, str(work / "peer"), str(result)]
        commands = {preset: [*ours, preset] for preset in args.presets}
        commands |= {} if args.no_peer else {PEER: [*peer, "--batch-size", str(args.peer_batch)]}
        rounds = []
        for number in range(args.runs):
            rounds.append(
                {f"{n} {d}": run([*command, "--dtype", d], result) for d in args.dtypes for n, command in commands.items()}
            )
            seen = {name: (round(job["seconds"]["total"], 1), job["peak_rss_bytes"]) for name, job in rounds[-1].items()}
            print(number, seen, flush=True)
    ratios = {} if args.no_peer else {f"{p} {d}": compare(rounds, p, d) for d in args.dtypes for p in args.presets}
    print(json.dumps(ratios, indent=1))
    job = {"model": MODEL, "samples": SAMPLES, "seq_len": SEQ_LEN, "bits": 4, "group_size": 128}
    print("wrote", write_result(args.name, {**circumstances(), "job": job, "summary": ratios, "rounds": rounds}))


def compare(rounds: list[dict[str, Any]], preset: str, dtype: str) -> dict[str, float]:
    """Medians over the rounds of the ratios within a round."""
    pairs = [(entry[f"{preset} {dtype}"], entry[f"{PEER} {dtype}"]) for entry in rounds]
    times = [peer["seconds"]["total"] / ours["seconds"]["total"] for ours, peer in pairs]
    memory = [ours["peak_rss_bytes"] / peer["peak_rss_bytes"] for ours, peer in pairs]
    return {"times_as_fast": statistics.median(times), "memory_ratio": statistics.median(memory)}


if __name__ == "__main__":
    main()
