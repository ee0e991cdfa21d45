"""GPTQModel on the CPU with given calibration ids: the peer of the benchmarks of quality, time and memory.

Standalone: run with the python of the interoperability venv.

    python peer_gptqmodel.py MODEL_FOLDER TOKENS.npy OUT_FOLDER RESULT.json [options]

MODEL_FOLDER is a float Hugging Face checkpoint with a tokenizer (GPTQModel loads one, though the ids are used unchanged);
TOKENS holds int [samples, seq_len]. Options that are not given keep GPTQModel's own defaults, except the dtype: on a CPU its
default casts the whole model to bfloat16 and writes every float tensor in it; `--dtype auto` does that.
RESULT.json: {"seconds": {"load", "quantize", "save", "total"}, "peak_rss_bytes", "versions", "settings"}. The
seconds exclude imports; the bytes include their memory.
"""

import argparse
import json
import os
import platform
import resource
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "4")  # its default is half the cores, and it fails with one worker
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.utils.cpp import load_pack_block_extension

TOO_SHORT = 10  # GPTQModel drops samples of this many tokens or fewer
PASSED_ON = ("bits", "group_size", "sym", "desc_act", "mse", "act_group_aware", "damp_percent", "format", "offload_to_disk")


def calibration(tokens: np.ndarray) -> list[dict[str, torch.Tensor]]:
    """The samples in the form that GPTQModel takes, all tokens attended to."""
    rows = torch.from_numpy(tokens.astype(np.int64))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]


def check_kept(tokens: np.ndarray, model_folder: Path) -> None:
    """Exits where GPTQModel would drop or cut samples of this length without an error."""
    longest = json.loads((model_folder / "config.json").read_text()).get("max_position_embeddings", tokens.shape[1])
    length = tokens.shape[1]
    if not TOO_SHORT < length <= longest:
        raise SystemExit(f"GPTQModel would drop or cut samples of {length} tokens; keep within {TOO_SHORT + 1} to {longest}")


def quantize_config(args: argparse.Namespace) -> QuantizeConfig:
    """The given settings over GPTQModel's defaults."""
    given = {name: getattr(args, name) for name in PASSED_ON}
    if args.group_size == -1 and args.act_group_aware is None:
        given["act_group_aware"] = False  # its default, True, is an error without groups
    return QuantizeConfig(device="cpu", **{name: value for name, value in given.items() if value is not None})


def run(args: argparse.Namespace) -> dict[str, object]:
    """Quantizes and saves; returns the content of RESULT.json."""
    tokens = np.load(args.tokens)
    check_kept(tokens, args.model_folder)
    config = quantize_config(args)
    load_pack_block_extension()  # compiles C++ for 40 s when first used, and keeps that in ~/.cache: part of the installation
    dtype = "auto" if args.dtype == "auto" else getattr(torch, args.dtype)
    marks = [time.perf_counter()]
    model = GPTQModel.load(str(args.model_folder), config, dtype=dtype)
    marks.append(time.perf_counter())
    model.quantize(calibration(tokens), calibration_sort=None, batch_size=args.batch_size, backend=BACKEND.TORCH)
    marks.append(time.perf_counter())
    model.save(str(args.out_folder))
    marks.append(time.perf_counter())
    seconds = dict(zip(("load", "quantize", "save"), np.diff(marks).tolist(), strict=True))
    return {
        "seconds": {**seconds, "total": marks[-1] - marks[0]},
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("gptqmodel", "torch", "transformers")},
        "settings": {
            "samples": tokens.shape[0],
            "seq_len": tokens.shape[1],
            "batch_size": args.batch_size,
            "dtype": str(model.model.dtype),
            "torch_threads": torch.get_num_threads(),
            "cpu_workers": int(os.environ["GPTQMODEL_CPU_WORKERS"]),
            "cpu_count": os.cpu_count(),
            "quantize_config": {"damp_percent": config.damp_percent, **without_paths(config.to_dict())},
        },
    }


def without_paths(settings: dict[str, object]) -> dict[str, object]:
    """The settings without the scratch folder of this run."""
    kept = {name: value for name, value in settings.items() if not name.endswith("_path")}
    return {name: without_paths(value) if isinstance(value, dict) else value for name, value in kept.items()}


def parse_args() -> argparse.Namespace:
    """The command line; an option that is None keeps GPTQModel's default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model_folder", "tokens", "out_folder", "result"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--mse", type=float)
    parser.add_argument("--damp-percent", type=float)
    parser.add_argument("--format", choices=("gptq", "gptq_v2"))
    for flag in ("--sym", "--desc-act", "--act-group-aware", "--offload-to-disk"):
        parser.add_argument(flag, action=argparse.BooleanOptionalAction)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "auto"), default="float32")
    return parser.parse_args()


def main() -> None:
    """Reads the command line and writes RESULT.json."""
    args = parse_args()
    args.result.write_text(json.dumps(run(args), indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
