"""The same computation in a process that sees the CPU alone: kernels are chosen by a process' first device."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np


def start_on_cpu(script: str, *arguments: str) -> Callable[[], dict[str, np.ndarray]]:
    """Starts a script of this folder on the CPU, at the same time as what follows.

    Args:
      script: its file; it takes `--save FILE` and writes its arrays there, as npz.
      arguments: of the script.

    Returns:
      A function that waits for the arrays and gives them.
    """
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "arrays.npz"
    command = [sys.executable, script, *arguments, "--save", str(path)]
    process = subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"})

    def arrays() -> dict[str, np.ndarray]:
        with folder:
            if process.wait():
                raise RuntimeError(f"the process on the CPU ended with status {process.returncode}: {' '.join(command)}")
            with np.load(path) as loaded:
                return dict(loaded)

    return arrays
