"""Strict arithmetic for every test (no implicit promotion of dtypes or ranks), and what several rooms share."""

import os
from pathlib import Path

# Tests compile many small programs and run each a few times: what LLVM would optimize takes longer than it saves. Set before
# anything imports jax, and handed on to the processes that tests start.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
# Several processes share the cores, and OpenBLAS' threads wait for each other by spinning. Set before anything imports numpy.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# What one process compiled the others need not.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import hypothesis
import jax
import pytest
import tiny
from problems import problem, small  # noqa: F401, fixtures for all
from texts import hub, tokenizer, tokenizer_folder  # noqa: F401, fixtures for all

from converters import save_hf

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# An example may be the first of its shape and compile.
hypothesis.settings.register_profile("compiling", deadline=None)
hypothesis.settings.load_profile("compiling")


_MAPS = Path("/proc/self/maps")
_MOST_MAPS = 25_000


def pytest_runtest_teardown() -> None:
    """A process of Linux has 65,530 mappings of memory. A compiled program takes several, and LLVM aborts where none is left."""
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MOST_MAPS:
        jax.clear_caches()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.folder(tmp_path / "model")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return save_hf(tiny.decoder(), tmp_path / "model", format="float", max_shard_size="40KB")
