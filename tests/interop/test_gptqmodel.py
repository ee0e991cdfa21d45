"""Exported folders, read by GPTQModel on a CPU: the same weights bit for bit, the same logits to 1e-3.

Needs `make interop-venv`; `make interop` runs it.
"""

import dataclasses
import json
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import sparse
import tiny
from tokenizers import Tokenizer, models

import jgptq
from converters import load_hf, save_hf
from jgptq import tinycode
from jgptq.models import Decoder, checkpoint_name, single_linears
from jgptq.models.packed import PackedTensor
from jgptq.tinycode.corpus import stdlib_documents

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-interop/bin/python"
STORIES = ROOT / "../shared/data/stories260k"

pytestmark = pytest.mark.filterwarnings("ignore:vLLM refuses")


def packed_kernels(decoder: Decoder) -> dict[str, PackedTensor]:
    kernels = {
        checkpoint_name(f"layers.{index}.{path}", decoder.config.model_type): linear.kernel.get_value()
        for index, block in enumerate(decoder.layers)
        for stack, linears in block.linears().items()
        for path, linear in single_linears(stack, linears)
    }
    if decoder.lm_head is not None:
        kernels[checkpoint_name("lm_head", decoder.config.model_type)] = decoder.lm_head.kernel.get_value()
    return {name: kernel for name, kernel in kernels.items() if isinstance(kernel, PackedTensor)}


def read_by_gptqmodel(folder: Path, tokens: np.ndarray, scratch: Path) -> dict[str, np.ndarray]:
    """What `gptqmodel_reader.py` reads out of a folder."""
    if not (folder / "tokenizer.json").exists():  # GPTQModel will not load a folder without one
        Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(str(folder / "tokenizer.json"))
    np.save(scratch / "tokens.npy", tokens)
    command = [PYTHON, Path(__file__).with_name("gptqmodel_reader.py"), folder, scratch / "tokens.npy", scratch / "read.npz"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=scratch, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return dict(np.load(scratch / "read.npz"))


def check(folder: Path, tokens: np.ndarray, scratch: Path) -> None:
    """Reads a folder with both and compares names, weights and logits."""
    read = read_by_gptqmodel(folder, tokens, scratch)
    ours = load_hf(folder)
    kernels = packed_kernels(ours)
    assert sorted(read["modules"].tolist()) == sorted(kernels)
    for name, kernel in kernels.items():
        np.testing.assert_array_equal(read[f"weight/{name}"], np.asarray(kernel.dequantize()), err_msg=name)
    logits = np.asarray(ours(jnp.asarray(tokens)))
    assert np.abs(logits).max() > 1
    assert np.abs(read["logits"] - logits).max() < 1e-3


FORMATS = [
    (4, True, 32, "gptq"),
    (4, False, 32, "gptq_v2"),
    (2, True, 64, "gptq"),
    (3, True, 32, "gptq"),
    (3, False, -1, "gptq_v2"),
]


@pytest.mark.parametrize(
    ("bits", "sym", "group_size", "file_format"), [*FORMATS, (8, True, -1, "gptq"), (8, False, 64, "gptq_v2")]
)
def test_gptqmodel_reads_every_format(tmp_path: Path, bits: int, sym: bool, group_size: int, file_format):
    params = tiny.decoder(intermediate_size=128, qkv_bias=True, model_type="qwen2")
    quantized, _ = jgptq.quantize(params, tiny.tokens(), preset="fast", bits=bits, sym=sym, group_size=group_size)
    check(save_hf(quantized, tmp_path / "out", format=file_format), tiny.tokens(2), tmp_path)


MIXED = {
    "+:lm_head": {"bits": 8, "group_size": 64},
    "+:.*down_proj": {"bits": 8},
    "+:.*layers.1.self_attn.[qkv]_proj": {"bits": 2, "group_size": -1},
    "-:.*layers.0": {},  # GPTQModel itself would try this rule first, and skip the first block's down_proj as well
}


@pytest.mark.parametrize(("lm_head", "max_shard_size"), [(True, "20KB"), (False, "5GB")])
@pytest.mark.filterwarnings("ignore:transformers reads no rules", "ignore:rule 'lm_head'")
def test_gptqmodel_reads_mixed_settings(tmp_path: Path, lm_head: bool, max_shard_size: str):
    quantized, _ = jgptq.quantize(tiny.decoder(), tiny.tokens(), preset="fast", group_size=32, rules=MIXED, lm_head=lm_head)
    assert sorted(kernel.bits for kernel in packed_kernels(quantized).values()) == [2, 2, 2, 4, 4, 4, 8, 8] + [8] * lm_head
    check(save_hf(quantized, tmp_path / "out", max_shard_size=max_shard_size), tiny.tokens(2), tmp_path)


FC2 = {r"+:model\.decoder\.layers\.\d+\.fc2$": {"bits": 8}, r"-:.*layers\.1\.fc1": {}}


@pytest.mark.parametrize(
    ("changes", "settings"),
    [(tiny.OPT, {"preset": "fast"}), (tiny.OPT_350M, {"preset": "balanced", "rules": FC2})],
    ids=["pre-norm", "as-the-350m"],
)
@pytest.mark.filterwarnings("ignore:transformers reads no rules")
def test_gptqmodel_reads_an_opt(tmp_path: Path, changes: dict, settings: dict):
    quantized, _ = jgptq.quantize(tiny.decoder(**changes), tiny.tokens(), group_size=32, **settings)
    names = packed_kernels(quantized)
    assert "model.decoder.layers.0.self_attn.out_proj" in names
    assert ("model.decoder.layers.1.fc1" in names) == ("rules" not in settings)
    check(save_hf(quantized, tmp_path / "out"), tiny.tokens(2), tmp_path)


@pytest.mark.parametrize(
    ("changes", "linear"),
    [
        (tiny.GPT2, "transformer.h.1.attn.c_attn"),
        (tiny.NEOX | {"tie_word_embeddings": True}, "gpt_neox.layers.1.attention.query_key_value"),
    ],
    ids=["gpt2", "gpt-neox-tied"],
)
def test_gptqmodel_reads_linears_that_files_hold_fused(tmp_path: Path, changes: dict, linear: str):
    quantized, _ = jgptq.quantize(tiny.decoder(**changes), tiny.tokens(), preset="fast", group_size=32)
    assert linear in packed_kernels(quantized)
    check(save_hf(quantized, tmp_path / "out"), tiny.tokens(2), tmp_path)


@pytest.mark.filterwarnings("ignore:GPTQModel 7.6 refuses a fused gate_up_proj")
def test_gptqmodel_reads_a_phi3_whose_gate_and_up_are_parted(tmp_path: Path):
    """GPTQModel 7.6 asks for gate_proj and up_proj; the two halves of gate_up_proj are what it means by them."""
    quantized, _ = jgptq.quantize(tiny.decoder(**tiny.PHI3), tiny.tokens(), preset="fast", group_size=32)
    out, tokens = save_hf(quantized, tmp_path / "out"), tiny.tokens(2)
    tiny.part_gate_and_up(out)
    config = json.loads((out / "config.json").read_text())
    # transformers' default, 32000 in a Phi-3, has to lie within the vocabulary.
    (out / "config.json").write_text(json.dumps(config | {"pad_token_id": 0}))
    read = read_by_gptqmodel(out, tokens, tmp_path)
    tiny.assert_same(quantized, load_hf(out))
    parts = [read[f"weight/model.layers.0.mlp.{part}"] for part in ("gate_proj", "up_proj")]
    kernel = quantized.layers[0].mlp.gate_up_proj.kernel.get_value()
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), np.asarray(kernel.dequantize()))
    assert np.abs(read["logits"] - np.asarray(quantized(jnp.asarray(tokens)))).max() < 1e-3


@pytest.mark.parametrize("form", ["qwen3_moe", "olmoe", "qwen2_moe"])
def test_gptqmodel_reads_experts(tmp_path: Path, form: str):
    changes = dict(sparse.FORMS[form])  # it knows of no dense blocks among those with experts
    changes["experts"] = dataclasses.replace(changes["experts"], sparse_layers=(True, True))
    quantized, _ = jgptq.quantize(tiny.decoder(**changes), tiny.tokens(), preset="fast", group_size=32)
    check(save_hf(quantized, tmp_path / "out"), tiny.tokens(2), tmp_path)


def test_gptqmodel_reads_the_embedded_model(tmp_path: Path):
    params = load_hf(tinycode.FOLDER)
    calib = jgptq.calibration_tokens(stdlib_documents("train"), tinycode.FOLDER, samples=128, seq_len=32)
    quantized, _ = jgptq.quantize(params, calib, preset="fast")
    check(save_hf(quantized, tmp_path / "out", max_shard_size="1MB"), calib[:2], tmp_path)


@pytest.mark.skipif(not STORIES.exists(), reason=f"needs {STORIES}")
def test_gptqmodel_reads_a_model_whose_odd_layers_stay_float(tmp_path: Path):
    calib = jgptq.calibration_tokens(STORIES / "calib_ids.npy", samples=128, seq_len=32)
    quantized, report = jgptq.quantize(load_hf(STORIES), calib, preset="fast", bits=3, group_size=32)
    out = save_hf(quantized, tmp_path / "out", format="gptq_v2")
    assert len(report.kept_float) == 15
    assert len(json.loads((out / "config.json").read_text())["quantization_config"]["dynamic"]) == 3
    check(out, np.load(STORIES / "eval_ids.npy")[:512].reshape(2, 256).astype(np.int32), tmp_path)
