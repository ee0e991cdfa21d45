"""Which libraries an import loads."""

import subprocess
import sys


def test_importing_jgptq_loads_no_heavy_library():
    program = (
        "import sys, jgptq, converters; "
        "print([name for name in ('torch', 'transformers', 'datasets', 'matplotlib', 'pandas', 'rich', 'huggingface_hub') "
        "if name in sys.modules and name not in before])"
    )
    # Flax itself may load some of them; only what jgptq adds counts.
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from flax import nnx; before = set(sys.modules); " + program],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
