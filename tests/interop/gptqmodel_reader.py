"""What GPTQModel reads out of a GPTQ folder. Standalone: run with the python of the interoperability venv.

    python gptqmodel_reader.py FOLDER TOKENS.npy OUT.npz [--dtype float32|float16|bfloat16]

OUT.npz holds `modules` (the names of the quantized modules), `weight/<name>` (each one's weight [K, N] as GPTQModel's own
`dequantize_weight` unpacks it) and `logits` [b, S, vocab] of TOKENS (int [b, S]), all float32.

GPTQModel's torch kernel declares float16 and bfloat16 only, though nothing in it depends on that: the scales are cast to the
model's dtype at load and `scale * (code - zero)` follows. In float32, the default here, a float16 scale times an integer is
exact, so the weights can be compared bit for bit; `float16` shows what a user of GPTQModel gets.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # it compiles the unpacking of every shape: seconds each, nothing gained here
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from gptqmodel.nn_modules.qlinear.torch import TorchLinear


def load(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The transformers model with GPTQModel's linears inside, on the CPU in `dtype`."""
    if dtype not in TorchLinear.SUPPORTS_DTYPES:
        TorchLinear.SUPPORTS_DTYPES = [*TorchLinear.SUPPORTS_DTYPES, dtype]
    return GPTQModel.load(str(folder), device="cpu", backend=BACKEND.TORCH, dtype=dtype).model.eval()


def quantized_linears(model: torch.nn.Module) -> dict[str, BaseQuantLinear]:
    """Every quantized linear by its full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseQuantLinear)}


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A float32 copy."""
    return tensor.detach().to(torch.float32).numpy()


@torch.inference_mode()
def read(folder: Path, tokens: np.ndarray, dtype: torch.dtype) -> dict[str, np.ndarray]:
    """The arrays of OUT.npz."""
    model = load(folder, dtype)
    linears = quantized_linears(model)
    weights = {f"weight/{name}": to_numpy(linear.dequantize_weight()) for name, linear in linears.items()}
    logits = model(torch.from_numpy(tokens.astype(np.int64)), use_cache=False).logits
    return {"modules": np.array(list(linears), dtype=np.str_), "logits": to_numpy(logits), **weights}


def main() -> None:
    """Read the command line, write OUT.npz."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    args = parser.parse_args()
    np.savez(args.out, **read(args.folder, np.load(args.tokens), getattr(torch, args.dtype)))


if __name__ == "__main__":
    main()
