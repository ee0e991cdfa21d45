"""What the benchmarks share: random checkpoints, and the device, versions and commit of a measurement."""

import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from converters.output.shards import ShardWriter, TensorSpec

RESULTS = Path(__file__).parent / "results"


def random_llama(
    folder: Path, *, blocks: int, width: int, inner: int, heads: int, vocab: int, max_positions: int, dtype: str = "float16"
) -> Path:
    """Writes a random Llama as a Hugging Face folder, tensor by tensor, with a tokenizer of as many byte-level tokens as fit.

    Args:
      folder: the folder to write; replaced where it exists.
      blocks: L.
      width: D.
      inner: width of the MLP.
      heads: attention heads, each with its own keys and values.
      vocab: V.
      max_positions: context length that the config states.
      dtype: float16, bfloat16 or float32.
    """
    stored = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width)}
    for index in range(blocks):
        block = f"model.layers.{index}"
        shapes |= {f"{block}.self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{block}.mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        shapes[f"{block}.mlp.down_proj.weight"] = (width, inner)
        shapes |= {f"{block}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    shapes["model.norm.weight"] = (width,)
    random = np.random.default_rng(0)
    writer = ShardWriter(folder, [TensorSpec(name, stored, shape) for name, shape in shapes.items()], max_shard_size="500MB")
    for name, shape in shapes.items():
        values = np.ones(shape) if len(shape) == 1 else random.standard_normal(shape, np.float32) * (0.5 / np.sqrt(shape[1]))
        writer.write(name, values.astype(stored))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": vocab,
        "max_position_embeddings": max_positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": dtype,
    }
    writer.write_text("config.json", json.dumps(config, indent=1))
    write_tokenizer(writer.folder)
    return writer.finish()


def random_tokens(path: Path, samples: int, seq_len: int, vocab: int) -> Path:
    """Writes int32 ids `[samples, seq_len]`."""
    np.save(path, np.random.default_rng(1).integers(0, vocab, (samples, seq_len), dtype=np.int32))
    return path


def circumstances() -> dict[str, Any]:
    """The device, versions and commit of a measurement."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    dirty = subprocess.run(
        ["git", "status", "--porcelain"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor())
    device = jax.devices()[0]
    accelerator = "" if device.platform == "cpu" else f"{device.device_kind}, "
    names = ("jax", "jaxlib", "flax", "numpy")
    return {
        "device": f"{accelerator}{cpu}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
        "commit": commit.stdout.strip() + ("+changes" if dirty.stdout.strip() else ""),
    }


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Writes `benchmarks/results/<name>.json`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def write_tokenizer(folder: Path) -> None:
    """Writes a byte-level tokenizer, for readers that require one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: index for index, token in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
