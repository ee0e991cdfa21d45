"""The traced driver against the staged one on a decoder of ours: seconds, peak memory, and the codes that differ.

    python benchmarks/bench_trace.py

A random Llama, float32; 4 bit, group 128. The staged driver is written for our decoders; the traced one finds the same linears in
the computation of any model. Every job runs in a process of its own, staged and traced alternating, `--runs` times; figures are
medians of the ratios within a round, preset by preset. Seconds cover quantize alone, compilation included.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import circumstances, random_llama, random_tokens, write_result

MODEL = {"blocks": 4, "width": 512, "inner": 1408, "heads": 8, "vocab": 2048, "max_positions": 2048}
SAMPLES, SEQ_LEN = 32, 256
BAR = 1.3


def job(folder: Path, tokens: Path, preset: str, traced: bool, out: Path) -> dict[str, float]:
    """Quantizes the model, stores its packed weights, and returns seconds and peak memory; for a process of its own."""
    import jax

    import jgptq
    from converters import load_hf

    params, calib = load_hf(folder), np.load(tokens)
    how: dict[str, Any] = {"apply": lambda decoder, batch: decoder(batch)} if traced else {}
    started = time.perf_counter()
    quantized, _ = jgptq.quantize(params, calib, preset=preset, **how)
    seconds = time.perf_counter() - started
    kernels = [linear.kernel.get_value() for block in quantized.layers for linear in block.linears().values()]
    packed = [kernel.packed if traced else kernel for kernel in kernels]
    np.savez(out, *[np.asarray(leaf) for kernel in packed for leaf in jax.tree.leaves(kernel.qweight)])
    return {"seconds": seconds, "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def differing(left: Path, right: Path) -> float:
    """The fraction of 32-bit words of codes that differ."""
    with np.load(left) as a, np.load(right) as b:
        return float(np.mean(np.concatenate([(a[name] != b[name]).reshape(-1) for name in a.files])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--presets", nargs="+", default=["fast", "balanced"])
    args = parser.parse_args()
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        folder = random_llama(work / "model", **MODEL, dtype="float32")
        tokens = random_tokens(work / "tokens.npy", SAMPLES, SEQ_LEN, MODEL["vocab"])
        for number in range(args.runs):
            rounds.append({})
            for preset in args.presets:
                codes = {name: work / f"{name}.npz" for name in ("staged", "traced")}
                for name, out in codes.items():
                    with multiprocessing.get_context("spawn").Pool(1) as pool:
                        done = pool.apply(job, (folder, tokens, preset, name == "traced", out))
                    rounds[-1][f"{name} {preset}"] = done
                rounds[-1][f"differing {preset}"] = differing(*codes.values())
            print(number, json.dumps(rounds[-1]), flush=True)
    summary = {preset: compare(rounds, preset) for preset in args.presets}
    print(json.dumps(summary, indent=1))
    setting = {"model": MODEL, "samples": SAMPLES, "seq_len": SEQ_LEN, "bits": 4, "group_size": 128, "bar": BAR}
    print("wrote", write_result("trace_cpu", {**circumstances(), "job": setting, "summary": summary, "rounds": rounds}))


def compare(rounds: list[dict[str, Any]], preset: str) -> dict[str, float]:
    """Medians over the rounds of traced by staged."""
    pairs = [(entry[f"traced {preset}"], entry[f"staged {preset}"]) for entry in rounds]
    ratios = {name: statistics.median(t[name] / s[name] for t, s in pairs) for name in ("seconds", "peak_rss_bytes")}
    return {**ratios, "differing_words": max(entry[f"differing {preset}"] for entry in rounds)}


if __name__ == "__main__":
    main()
