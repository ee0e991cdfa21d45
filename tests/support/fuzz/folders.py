"""The folders that are damaged, as bytes by file name."""

import io
import json
import tempfile
import warnings
from pathlib import Path

import safetensors.torch
import tiny
import torch

import jgptq
from converters import save_hf
from converters.checkpoint import SINGLE

Files = dict[str, bytes]

BIN = "pytorch_model.bin"
BLOCK = {"num_hidden_layers": 1, "layer_windows": (None,)}


def originals() -> dict[str, Files]:
    """One folder of each form that is read: float in one file and in shards, GPTQ v1 and v2, torch in one file and in shards."""
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what other programs read
        root = Path(scratch)
        model = tiny.decoder(**BLOCK)
        save_hf(model, root / "float", "float")
        save_hf(tiny.decoder(**BLOCK, tie_word_embeddings=True), root / "sharded", "float", max_shard_size="20KB")
        save_hf(jgptq.quantize(model, method="rtn", group_size=32)[0], root / "gptq")
        rules = {"+:.*down_proj": {"bits": 8}, "-:.*o_proj": {}}
        mixed, _ = jgptq.quantize(model, method="rtn", bits=3, sym=False, group_size=32, rules=rules)
        save_hf(mixed, root / "gptq_v2", "gptq_v2")
        found = {folder.name: {path.name: path.read_bytes() for path in folder.iterdir()} for folder in sorted(root.iterdir())}
    state = safetensors.torch.load(found["float"][SINGLE])
    config = {"config.json": found["float"]["config.json"]}
    shards = {f"pytorch_model-{number}.bin": dict(list(state.items())[number::2]) for number in (0, 1)}
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    found["torch"] = config | {BIN: _saved(state)}
    found["torch_sharded"] = config | {file: _saved(part) for file, part in shards.items()}
    found["torch_sharded"][f"{BIN}.index.json"] = json.dumps(index).encode()
    return found


def _saved(state: dict[str, torch.Tensor]) -> bytes:
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()
