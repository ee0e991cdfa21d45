"""GPTQModel on the CPU with many settings in one process: the peer of `bench_quality.py`.

Standalone: run with the python of the interoperability venv.

    python peer_quality.py MODEL_FOLDER TOKENS.npy SETTINGS.json OUT_FOLDER

SETTINGS.json maps a name to {"bits", "group_size", "sym", "mse", "gptaq_alpha" (null: off), "act_group_aware", "skip" (regexes of
modules that stay float)}; each name becomes a folder in OUT_FOLDER, with the seconds that its quantization took in `seconds.txt`.
Folders that exist are not made again, so that a stopped sweep resumes.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization.config import GPTAQConfig
from gptqmodel.utils.cpp import load_pack_block_extension
from peer_gptqmodel import calibration, check_kept


def config_of(setting: dict[str, Any]) -> QuantizeConfig:
    """One setting over GPTQModel's defaults, in format v2, which stores asymmetric zero points unchanged."""
    alpha = setting["gptaq_alpha"]
    return QuantizeConfig(
        device="cpu",
        offload_to_disk=False,
        bits=setting["bits"],
        group_size=setting["group_size"],
        sym=setting["sym"],
        mse=setting["mse"],
        act_group_aware=setting["act_group_aware"],
        desc_act=False,
        format="gptq_v2",
        gptaq=None if alpha is None else GPTAQConfig(alpha=alpha, device="cpu"),
        dynamic={f"-:{regex}": {} for regex in setting["skip"]} or None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model_folder", "tokens", "settings", "out_folder"):
        parser.add_argument(name, type=Path)
    args = parser.parse_args()
    tokens = np.load(args.tokens)
    check_kept(tokens, args.model_folder)
    load_pack_block_extension()
    for name, setting in json.loads(args.settings.read_text()).items():
        folder = args.out_folder / name
        if (folder / "seconds.txt").exists():
            continue
        shutil.rmtree(folder, ignore_errors=True)
        model = GPTQModel.load(str(args.model_folder), config_of(setting), dtype=torch.float32)
        started = time.perf_counter()
        model.quantize(calibration(tokens), calibration_sort=None, batch_size=8, backend=BACKEND.TORCH)
        seconds = time.perf_counter() - started
        model.save(str(folder))
        (folder / "seconds.txt").write_text(f"{seconds:.3f}\n")
        print(f"{name}: {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
