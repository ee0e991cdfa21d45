"""One whole quantization job in a process of its own: load, quantize block by block into the folder, finish.

    python benchmarks/job_jgptq.py MODEL_FOLDER TOKENS.npy OUT_FOLDER RESULT.json [--bits 4 --group-size 128 --dtype auto]
        [--preset balanced] [--set NAME=VALUE ...]

VALUE is parsed as JSON, or is a string where it is not JSON: refine=2, scale=mse, target_shift=0.5.

RESULT.json: {"seconds": {"load", "quantize", "save", "total"}, "peak_rss_bytes"}; seconds exclude imports and include
compilation.
"""

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np

import jgptq
from converters import FolderSink, load_hf
from jgptq.settings.presets import make_config


def setting(text: str) -> tuple[str, Any]:
    """Parses `NAME=VALUE`."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model_folder", "tokens", "out_folder", "result"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--set", nargs="+", default=[], type=setting, metavar="NAME=VALUE", help="other settings of the run")
    args = parser.parse_args()

    tokens = np.load(args.tokens)
    config = make_config({"preset": args.preset, "bits": args.bits, "group_size": args.group_size} | dict(args.set))
    started = time.perf_counter()
    params = load_hf(args.model_folder, args.dtype)
    loaded = time.perf_counter()
    sink = FolderSink(args.out_folder, params, config, tokens, overwrite=True)
    qparams, report = jgptq.quantize(params, tokens, config=config, sink=sink)
    quantized = time.perf_counter()
    sink.finish(qparams, report)
    saved = time.perf_counter()
    seconds = {"load": loaded - started, "quantize": quantized - loaded, "save": saved - quantized, "total": saved - started}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    args.result.write_text(json.dumps({"seconds": seconds, "peak_rss_bytes": peak}, indent=1))


if __name__ == "__main__":
    main()
