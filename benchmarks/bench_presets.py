"""What presets and options cost: the time of a whole job with each, relative to preset `balanced`.

    python benchmarks/bench_presets.py

The random Llama and tokens of `bench_quantize.py`; 4 bit, group 128. Every job runs in a process of its own, all of a round one
after the other, `--runs` rounds; the figures are medians of the ratios to `balanced` of the same round. Seconds cover load,
quantize and save, compilation included, imports not. With random weights only the cost of a setting is meaningful, not its loss.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from bench_quantize import HERE, MODEL, SAMPLES, SEQ_LEN, run
from common import circumstances, random_llama, random_tokens, write_result

BASE = "balanced"
JOBS = {
    BASE: ["--preset", BASE],
    "fast": ["--preset", "fast"],
    "best": ["--preset", "best"],
    "fast, scale=minmax": ["--preset", "fast", "--set", "scale=minmax"],
    "fast, scale=mse": ["--preset", "fast", "--set", "scale=mse"],
    "fast, order=static": ["--preset", "fast", "--set", "order=static"],
    "fast, order=desc_act": ["--preset", "fast", "--set", "order=desc_act"],
    "fast, refit": ["--preset", "fast", "--set", "refit=true"],
    "fast, refine=3": ["--preset", "fast", "--set", "refine=3"],
    "method=rtn": ["--preset", "fast", "--set", "method=rtn"],
    "refine=1": ["--set", "refine=1"],
    "method=gptaq": ["--set", "method=gptaq"],
    "method=qronos": ["--set", "method=qronos"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS), help=f"{BASE} is always among them")
    parser.add_argument("--blocks", type=int, default=MODEL["blocks"])
    parser.add_argument("--dtype", default="float32", help="of activations")
    parser.add_argument("--name", default="presets_cpu", help="name of the result")
    args = parser.parse_args()
    model_of = MODEL | {"blocks": args.blocks}
    names = [BASE, *(name for name in args.jobs if name != BASE)]
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        model = random_llama(work / "model", **model_of)
        tokens = random_tokens(work / "tokens.npy", SAMPLES, SEQ_LEN, MODEL["vocab"])
        result = work / "result.json"
        command = [sys.executable, str(HERE / "job_jgptq.py"), str(model), str(tokens), str(work / "out"), str(result)]
        rounds = []
        for number in range(args.runs):
            rounds.append({name: run([*command, "--dtype", args.dtype, *JOBS[name]], result) for name in names})
            print(number, {name: round(job["seconds"]["total"], 1) for name, job in rounds[-1].items()}, flush=True)
    times = {
        name: statistics.median(entry[name]["seconds"]["total"] / entry[BASE]["seconds"]["total"] for entry in rounds)
        for name in names
    }
    for name, ratio in times.items():
        print(f"{name:24}{ratio:6.2f} times {BASE}")
    job = {"model": model_of, "samples": SAMPLES, "seq_len": SEQ_LEN, "bits": 4, "group_size": 128, "dtype": args.dtype}
    result_of = {**circumstances(), "job": job, "settings": JOBS, f"times_{BASE}": times, "rounds": rounds}
    print("wrote", write_result(args.name, result_of))


if __name__ == "__main__":
    main()
