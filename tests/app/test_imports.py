"""What importing costs and may not bring along."""

import subprocess
import sys


def test_importing_jgptq_brings_no_heavy_library_along():
    program = (
        "import sys, jgptq, converters; "
        "print([name for name in ('torch', 'transformers', 'datasets', 'matplotlib', 'pandas', 'rich', 'huggingface_hub') "
        "if name in sys.modules and name not in before])"
    )
    # Flax itself may bring some; only what jgptq adds counts.
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from flax import nnx; before = set(sys.modules); " + program],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
