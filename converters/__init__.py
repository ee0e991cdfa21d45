"""File formats <-> Flax: float and quantized checkpoints in, folders of every format out."""

from converters.conversion import convert
from converters.hub import push_to_hub
from converters.load import load_hf
from converters.orbax import load_orbax
from converters.save import save_hf
from converters.sink import FolderSink

__all__ = ["FolderSink", "convert", "load_hf", "load_orbax", "push_to_hub", "save_hf"]
