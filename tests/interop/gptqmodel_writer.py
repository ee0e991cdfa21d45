"""Folders that GPTQModel itself quantizes and writes, and what it reads out of them. Standalone: run with the python of the
interoperability venv.

    python gptqmodel_writer.py FOLDER TOKENS.npy OUT CASES.json

FOLDER is a float checkpoint with a tokenizer, TOKENS holds int [samples, S], CASES a list of objects, each a `name` and keywords
of GPTQModel's `QuantizeConfig`. OUT/<name> is the folder of a case, OUT/<name>.npz what `gptqmodel_reader` reads out of it.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "4")  # its default is half the cores, and it fails with one worker
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel_reader import read


def write(folder: Path, tokens: np.ndarray, out: Path, settings: dict[str, object]) -> None:
    """Quantizes with GPTQModel and saves."""
    rows = torch.from_numpy(tokens.astype(np.int64))
    calibration = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
    model = GPTQModel.load(str(folder), QuantizeConfig(device="cpu", offload_to_disk=False, **settings), dtype=torch.float32)
    model.quantize(calibration, calibration_sort=None, batch_size=len(calibration), backend=BACKEND.TORCH)
    model.save(str(out))


def main() -> None:
    """Reads the command line, writes a folder and a file for each case."""
    folder, tokens, out, cases = map(Path, sys.argv[1:])
    ids = np.load(tokens)
    for case in json.loads(cases.read_text()):
        name = case.pop("name")
        write(folder, ids, out / name, case)
        np.savez(out / f"{name}.npz", **read(out / name, ids[:2], torch.float32))


if __name__ == "__main__":
    main()
