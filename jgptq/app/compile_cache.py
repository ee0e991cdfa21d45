"""The persistent compilation cache of the commands: a second run of a model compiles nothing."""

import contextlib
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import typer

MOST_BYTES = 2**30
"""Size of the cache at most; the programs that were not used for longest go first."""

_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
_DAMAGED = "Error reading persistent compilation cache"
_UNWRITTEN = "Error writing persistent compilation cache"


def cache_folder() -> Path:
    """The folder of compiled programs, under the user's cache folder."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("jgptq")) / "compiled"


@contextlib.contextmanager
def compile_cache(wanted: bool, folder: Path | None = None, most_bytes: int = MOST_BYTES) -> Iterator[None]:
    """Has JAX keep what it compiles in a folder, and take it from there the next time.

    A cache that cannot be used is said once on standard error, and programs are compiled as without it. Where the environment
    names a cache of JAX's own (`JAX_COMPILATION_CACHE_DIR`), that one is used, under its own settings.

    Args:
      wanted: whether to use a cache at all.
      folder: where; None is `cache_folder()`.
      most_bytes: size of all programs at most.
    """
    if not wanted or os.environ.get(_VARIABLE):
        yield
        return
    folder = cache_folder() if folder is None else folder
    if (reason := _obstacle(folder)) is not None:
        _say(f"the compilation cache {folder} cannot be written ({reason}), so that nothing is kept for the next run")
        yield
        return
    import jax

    names = {
        "jax_compilation_cache_dir": str(folder),
        "jax_compilation_cache_max_size": most_bytes,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in names.items():
        jax.config.update(name, value)
    try:
        with _said_once(folder):
            yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def _obstacle(folder: Path) -> str | None:
    """Why a folder cannot be written, or None."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)


@contextlib.contextmanager
def _said_once(folder: Path) -> Iterator[None]:
    """Says once what JAX warns of for each program, and empties a cache whose files are damaged: JAX never replaces them."""
    troubles: set[str] = set()
    show = warnings.showwarning

    def shown(message: Warning | str, *where: object, **more: object) -> None:
        kind = next((kind for kind in (_DAMAGED, _UNWRITTEN) if str(message).startswith(kind)), None)
        if kind is None:
            show(message, *where, **more)  # type: ignore[arg-type]
        elif kind not in troubles:
            troubles.add(kind)
            what = "holds damaged files and is emptied" if kind == _DAMAGED else "cannot be written"
            _say(f"the compilation cache {folder} {what}; programs are compiled anew")

    with warnings.catch_warnings():
        warnings.filterwarnings("always", message="Error (reading|writing) persistent compilation cache")
        warnings.showwarning = shown
        try:
            yield
        finally:
            warnings.showwarning = show
            if _DAMAGED in troubles:
                for path in (*folder.glob("*-cache"), *folder.glob("*-atime")):
                    path.unlink(missing_ok=True)


def _say(sentence: str) -> None:
    typer.echo(f"warning: {sentence}. --no-compile-cache does without it.", err=True)
