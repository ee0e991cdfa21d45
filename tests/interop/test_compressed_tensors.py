"""Exported folders, read by the compressed-tensors package: the same linears, the same weights bit for bit.

Needs `make interop-venv`; `make interop` runs it.
"""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import tiny
from test_gptqmodel import PYTHON, packed_kernels

import jgptq
from converters import load_hf, save_hf

CASES = {
    "sym": {"group_size": 32},
    "asym": {"group_size": 32, "sym": False},
    "asym-8-channel": {"bits": 8, "group_size": -1, "sym": False},
    "mixed": {
        "group_size": 32,
        "rules": {"+:.*down_proj": {"bits": 8, "sym": False}, r"-:.*1\.self_attn\.o_proj": {}, ".*o_proj": {"group_size": -1}},
    },
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:transformers")
def test_compressed_tensors_reads_what_is_written(tmp_path: Path, name: str):
    quantized, _ = jgptq.quantize(tiny.decoder(), method="rtn", **CASES[name])
    out = save_hf(quantized, tmp_path / "out", format="compressed-tensors")
    command = [PYTHON, Path(__file__).with_name("compressed_tensors_reader.py"), out, tmp_path / "read.npz"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    read, kernels = np.load(tmp_path / "read.npz"), packed_kernels(load_hf(out))
    assert sorted(read.files) == sorted(kernels)
    for module, kernel in kernels.items():
        np.testing.assert_array_equal(read[module], np.asarray(kernel.dequantize()), err_msg=module)
