"""A small Llama trained on the Python standard library's own source, so that everything can be tried without a download.

This folder is a Hugging Face checkpoint: `converters.load_hf(jgptq.tinycode.FOLDER)`. `corpus` is the text it was trained and is
evaluated on, `train` the script that made it.
"""

from pathlib import Path

FOLDER = str(Path(__file__).parent)
"""The checkpoint's folder."""

SEQ_LEN = 256
"""Positions that the model was trained on."""
