"""The compilation cache of the commands: filled, reused, damaged, and not writable."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

PROGRAM = """
import json, sys
from jax._src import monitoring
events = []
monitoring.register_event_listener(lambda name, **_: events.append(name))
from pathlib import Path
from jgptq.app.compile_cache import compile_cache
with compile_cache(True, most_bytes=int(sys.argv[1])):
    import jax, jax.numpy as jnp
    for size in (3, 5, 7):
        jax.jit(lambda a: jnp.sin(a) @ a.T)(jnp.ones((size, size))).block_until_ready()
assert jax.config.jax_compilation_cache_dir is None
print(json.dumps({name: events.count(f"/jax/compilation_cache/cache_{name}") for name in ("hits", "misses")}))
"""


def environment(cache: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))}
    return kept | {"XDG_CACHE_HOME": str(cache)}


def compiles(cache: Path, most_bytes: int = 2**30) -> tuple[dict[str, int], str]:
    """Cache hits and misses of a process that compiles a few programs, and what it writes to standard error."""
    command = [sys.executable, "-c", PROGRAM, str(most_bytes)]
    done = subprocess.run(command, env=environment(cache), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def entries(cache: Path) -> list[Path]:
    return sorted((cache / "jgptq" / "compiled").glob("*-cache"))


def test_a_second_process_compiles_nothing(tmp_path: Path):
    first, _ = compiles(tmp_path)
    second, errors = compiles(tmp_path)
    assert (first["hits"], second["misses"]) == (0, 0)
    assert first["misses"] == second["hits"] == len(entries(tmp_path)) > 0
    assert errors == ""


def test_damaged_files_are_reported_once_and_replaced(tmp_path: Path):
    compiles(tmp_path)
    for path in entries(tmp_path):
        path.write_bytes(path.read_bytes()[:50])
    _, errors = compiles(tmp_path)
    assert errors.count("warning:") == 1
    assert "holds damaged files and is emptied" in errors
    assert entries(tmp_path) == []
    compiles(tmp_path)
    assert compiles(tmp_path) == ({"hits": len(entries(tmp_path)), "misses": 0}, "")


def test_a_cache_that_cannot_be_written_is_reported_once_and_the_run_succeeds(tmp_path: Path):
    (tmp_path / "file").write_text("")
    _, errors = compiles(tmp_path / "file")
    assert errors.count("warning:") == 1
    assert "cannot be written" in errors
    assert "--no-compile-cache" in errors


def test_the_cache_keeps_to_its_size(tmp_path: Path):
    compiles(tmp_path)
    most = max(path.stat().st_size for path in entries(tmp_path))
    small = tmp_path / "small"
    compiles(small, most)
    assert 0 < sum(path.stat().st_size for path in entries(small)) <= most


@pytest.mark.parametrize("flag", ["--compile-cache", "--no-compile-cache"])
def test_a_command_keeps_its_programs_unless_the_cache_is_off(tmp_path: Path, flag: str):
    folder, tokens = tiny.folder(tmp_path / "model"), tmp_path / "tokens.npy"
    np.save(tokens, tiny.tokens(4).reshape(-1))
    command = [sys.executable, "-m", "jgptq.app.cli", "eval", str(folder), "--data", str(tokens), "--seq-len", "16", flag]
    done = subprocess.run(command, env=environment(tmp_path / "cache"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert bool(entries(tmp_path / "cache")) == (flag == "--compile-cache")


def test_help_imports_neither_jax_nor_flax():
    program = "import sys; from jgptq.app.cli import app; print([m for m in ('jax', 'flax', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
