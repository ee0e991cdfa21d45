"""What the compressed-tensors package makes of a folder: which linears its config means, and their weights. Standalone: run with
the python of the interoperability venv.

    python compressed_tensors_reader.py FOLDER OUT.npz

OUT.npz holds each targeted linear's weight [K, N], float32, as the package's own compressor unpacks it. Scales are cast to
float32 first: a float16 scale times an integer is exact there, so that weights can be compared bit for bit.
"""

import json
import sys
from pathlib import Path

import numpy as np
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.lifecycle import apply_quantization_config
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


def read(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of OUT.npz."""
    hf = json.loads((folder / "config.json").read_text())
    config = QuantizationConfig.model_validate(hf.pop("quantization_config"))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf))
    apply_quantization_config(model, config)
    tensors, weights = load_file(folder / "model.safetensors"), {}
    for name, module in model.named_modules():
        if (scheme := getattr(module, "quantization_scheme", None)) is not None:
            parts = {part: tensors[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in tensors}
            parts["weight_scale"] = parts["weight_scale"].float()
            compressor = BaseCompressor.get_value_from_registry(config.format)
            weights[name] = compressor.decompress(parts, scheme)["weight"].numpy().T
    return weights


if __name__ == "__main__":
    np.savez(sys.argv[2], **read(Path(sys.argv[1])))
