"""Folders that GPTQModel quantized and wrote, read here: the same weights bit for bit, the same logits to 1e-3.

Needs `make interop-venv`; `make interop` runs it.
"""

import json
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_gptqmodel import PYTHON, packed_kernels
from tokenizers import Tokenizer, models

from converters import convert, load_hf

CASES: dict[str, dict] = {
    "asym": {"bits": 4, "group_size": 32, "sym": False, "format": "gptq_v2", "desc_act": False},
    "desc_act": {"bits": 4, "group_size": 32, "desc_act": True, "act_group_aware": False, "format": "gptq"},
    "two": {"bits": 2, "group_size": 32, "desc_act": False, "format": "gptq"},
    "three": {"bits": 3, "group_size": 32, "sym": False, "desc_act": True, "act_group_aware": False, "format": "gptq_v2"},
    "eight": {"bits": 8, "group_size": -1, "desc_act": False, "act_group_aware": False, "format": "gptq"},
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases, written by one process: importing GPTQModel takes most of the time."""
    place = tmp_path_factory.mktemp("gptqmodel")
    model = tiny.folder(
        place / "model",
        dtype=jnp.float32,
        num_hidden_layers=1,
        layer_windows=(None,),
        intermediate_size=128,
        tie_word_embeddings=True,
    )
    Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(str(model / "tokenizer.json"))
    np.save(place / "tokens.npy", tiny.tokens(8, 32))
    (place / "cases.json").write_text(json.dumps([{"name": name} | case for name, case in CASES.items()]))
    command = [PYTHON, Path(__file__).with_name("gptqmodel_writer.py"), model, place / "tokens.npy", place, place / "cases.json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=place, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return place


@pytest.mark.parametrize("name", CASES)
def test_what_gptqmodel_writes_is_read_as_it_reads_it(written: Path, name: str):
    read = np.load(written / f"{name}.npz")
    ours = load_hf(written / name)
    kernels = packed_kernels(ours)
    assert sorted(read["modules"].tolist()) == sorted(kernels)
    assert {kernel.bits for kernel in kernels.values()} == {CASES[name]["bits"]}
    for module, kernel in kernels.items():
        np.testing.assert_array_equal(read[f"weight/{module}"], np.asarray(kernel.dequantize()), err_msg=module)
    logits = np.asarray(ours(jnp.asarray(tiny.tokens(8, 32)[:2])))
    assert np.abs(read["logits"] - logits).max() < 1e-3
    assert any(kernel.group_index is not None for kernel in kernels.values()) == CASES[name]["desc_act"]
    assert any(kernel.zeros is not None for kernel in kernels.values()) == (not CASES[name].get("sym", True))


@pytest.mark.filterwarnings("ignore:transformers")
def test_what_gptqmodel_writes_converts_to_compressed_tensors(written: Path, tmp_path: Path):
    before = packed_kernels(load_hf(written / "asym"))
    after = packed_kernels(load_hf(convert(written / "asym", tmp_path / "out", "compressed-tensors")))
    assert list(before) == list(after)
    for module, kernel in before.items():
        np.testing.assert_array_equal(kernel.dequantize(), after[module].dequantize(), err_msg=module)
