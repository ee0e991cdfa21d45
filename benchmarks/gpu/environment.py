"""What runs the benchmarks: device, versions, commit, and the compiler's description of the device.

    python benchmarks/gpu/environment.py [--target gpu_target_config.pbtxt]

The description ("target config") is what XLA reads of a GPU: with it a program can be compiled for this device on a machine
without one (`benchmarks/aot.py`).
"""

import os
import tempfile
from pathlib import Path

DUMP = Path(tempfile.mkdtemp())
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={DUMP}"  # before jax

import paths  # isort: skip  # noqa: F401
import jax
import jax.numpy as jnp
from records import Record, arguments, environment, require_gpu


def target_config() -> str | None:
    """The compiler's description of the device, as text; None where it writes none, as on a CPU."""
    jax.block_until_ready(jax.jit(lambda a: a @ a + 1)(jnp.ones((128, 128))))
    texts = sorted(DUMP.glob("*gpu_target_config*"))
    return texts[0].read_text() if texts else None


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--target", type=Path, help="file for the description of the device")
    args = parser.parse_args()
    record = Record(args.record)
    record.put(**environment())
    require_gpu(args.rehearse)
    text = target_config()
    record.put(target_config=text is not None)
    if text is not None and args.target is not None:
        args.target.write_text(text)


if __name__ == "__main__":
    main()
