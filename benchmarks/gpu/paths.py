"""Puts this repository, its benchmarks and the tests' oracles first on the path: to be imported before anything of the project.

Nothing has to be installed, and what is installed is not what runs.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests" / "support")]
sys.path[:0] = FOLDERS
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # some scripts start others, which use the same device


def environment() -> dict[str, str]:
    """This process' environment, for a program of the project that does not import this."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([*FOLDERS, os.environ.get("PYTHONPATH", "")])}
