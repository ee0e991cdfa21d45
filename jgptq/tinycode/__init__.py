"""A small Llama trained on the Python standard library's own source, so that everything can be tried without a download.

This folder is a Hugging Face checkpoint: `converters.load_hf(jgptq.tinycode.FOLDER)`. `corpus` is the text that it was trained on
and is evaluated on; `train` is the script that made it.
"""

from pathlib import Path

FOLDER = str(Path(__file__).parent)
"""The checkpoint's folder."""

SEQ_LEN = 256
"""Length of the sequences that the model was trained on."""
