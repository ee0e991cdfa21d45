"""File formats <-> Flax: Hugging Face checkpoints in, GPTQ and float folders out."""

from converters.load import load_hf
from converters.save import save_hf
from converters.sink import FolderSink

__all__ = ["FolderSink", "load_hf", "save_hf"]
