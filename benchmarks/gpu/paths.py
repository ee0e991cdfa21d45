"""Puts this repository, its benchmarks and the tests' oracles first on the path: to be imported before anything of the project.

Nothing has to be installed, and what is installed is not what runs.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests" / "support")]
