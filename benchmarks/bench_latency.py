"""A small model from the command line: seconds of the whole process, compilation cache empty and filled, each preset.

    make interop-venv && python benchmarks/bench_latency.py

The embedded model, 128 samples of 256 tokens, 4 bit, group 128, symmetric: `jgptq quantize`, as a user types it, with an empty
cache folder (cold), and the same command again (warm). The peer is GPTQModel on the same tokens in a process of its own, with its
default batch size (1) and with the fastest one on two cores (8). All jobs of a round run one after the other; the figures are
medians of the ratios within a round. Whole processes: interpreter, imports, reading and writing included on both sides.
GPTQModel runs once before the clock starts, because it compiles an extension when it is first used.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import circumstances, write_result

import jgptq
from jgptq import tinycode
from jgptq.tinycode.corpus import stdlib_documents

HERE = Path(__file__).parent
SAMPLES, SEQ_LEN = 128, 256
PRESETS = ("fast", "balanced", "best")
PEER_BATCHES = (1, 8)
WANTED = {("balanced", "cold"): 1.5, ("balanced", "warm"): 2.5, ("fast", "cold"): 2.0, ("fast", "warm"): 4.0}


def seconds_of(command: list[str], environment: dict[str, str]) -> float:
    """Wall time of a whole process that has to succeed."""
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return time.perf_counter() - started


def ours(work: Path, tokens: Path, preset: str) -> dict[str, float]:
    """A cold run and a warm one of a preset."""
    cache = work / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    command = [sys.executable, "-m", "jgptq.app.cli", "quantize", tinycode.FOLDER, str(work / "ours"), "--calib", str(tokens)]
    command += ["--samples", str(SAMPLES), "--seq-len", str(SEQ_LEN), "--preset", preset, "--overwrite"]
    environment = {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(HERE.parent)}
    return {state: seconds_of(command, environment) for state in ("cold", "warm")}


def peer(work: Path, tokens: Path, python: str, batch: int) -> float:
    """GPTQModel on the same tokens."""
    command = [python, str(HERE / "peer_gptqmodel.py"), tinycode.FOLDER, str(tokens), str(work / "peer"), str(work / "peer.json")]
    return seconds_of([*command, "--batch-size", str(batch)], {})


def run_round(work: Path, tokens: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Every job once, one after the other."""
    peers = {str(batch): peer(work, tokens, args.peer_python, batch) for batch in PEER_BATCHES}
    return {"gptqmodel": peers, "jgptq": {preset: ours(work, tokens, preset) for preset in args.presets}}


def summary(rounds: list[dict[str, Any]], presets: list[str]) -> dict[str, Any]:
    """Median ratios GPTQModel / jgptq, by the peer's batch size, preset and state of the cache; and the targets."""
    return {
        f"{preset} {state}": {
            "seconds": statistics.median(entry["jgptq"][preset][state] for entry in rounds),
            "wanted": WANTED.get((preset, state)),
            **{
                f"times as fast as batch size {batch}": statistics.median(
                    entry["gptqmodel"][str(batch)] / entry["jgptq"][preset][state] for entry in rounds
                )
                for batch in PEER_BATCHES
            },
        }
        for preset in presets
        for state in ("cold", "warm")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), choices=PRESETS)
    parser.add_argument("--peer-python", default=str(HERE.parent / ".venv-interop/bin/python"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        tokens = work / "tokens.npy"
        np.save(tokens, jgptq.calibration_tokens(stdlib_documents("train"), tinycode.FOLDER, SAMPLES, SEQ_LEN))
        peer(work, tokens, args.peer_python, PEER_BATCHES[-1])
        rounds = []
        for number in range(args.rounds):
            rounds.append(run_round(work, tokens, args))
            print(number, json.dumps(rounds[-1]), flush=True)
    ratios = summary(rounds, args.presets)
    print(json.dumps(ratios, indent=1))
    job = {"model": "jgptq.tinycode", "samples": SAMPLES, "seq_len": SEQ_LEN, "bits": 4, "group_size": 128}
    print("wrote", write_result("latency_cpu", {**circumstances(), "job": job, "summary": ratios, "rounds": rounds}))


if __name__ == "__main__":
    main()
