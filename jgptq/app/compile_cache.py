"""The persistent compilation cache of the commands: a second run of a model compiles nothing."""

import contextlib
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import typer

MOST_BYTES = 2**30
"""Maximum size of the cache; the least recently used programs are deleted first."""

_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
_DAMAGED = "Error reading persistent compilation cache"
_UNWRITTEN = "Error writing persistent compilation cache"


def cache_folder() -> Path:
    """The folder of compiled programs, under the user's cache folder."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("jgptq")) / "compiled"


@contextlib.contextmanager
def compile_cache(wanted: bool, folder: Path | None = None, most_bytes: int = MOST_BYTES) -> Iterator[None]:
    """Has JAX store compiled programs in a folder and load them from there in later runs.

    A cache that cannot be used is reported once on standard error, and programs are compiled without it. Where the environment
    names a cache for JAX (`JAX_COMPILATION_CACHE_DIR`), that one is used, with the settings that JAX has for it.

    Args:
      wanted: whether to use a cache at all.
      folder: the folder; None is `cache_folder()`.
      most_bytes: maximum size of all programs together.
    """
    if not wanted or os.environ.get(_VARIABLE):
        yield
        return
    folder = cache_folder() if folder is None else folder
    if (reason := _why_not_writable(folder)) is not None:
        _warn(f"the compilation cache {folder} cannot be written ({reason}), so that the next run compiles again")
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
        with _warns_once(folder):
            yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def _why_not_writable(folder: Path) -> str | None:
    """Why a folder cannot be written, or None."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)


@contextlib.contextmanager
def _warns_once(folder: Path) -> Iterator[None]:
    """Prints one warning where JAX has one for each program, and empties a cache with damaged files: JAX never replaces them."""
    reported: set[str] = set()
    show = warnings.showwarning

    def shown(message: Warning | str, *where: object, **more: object) -> None:
        kind = next((kind for kind in (_DAMAGED, _UNWRITTEN) if str(message).startswith(kind)), None)
        if kind is None:
            show(message, *where, **more)  # type: ignore[arg-type]
        elif kind not in reported:
            reported.add(kind)
            what = "holds damaged files and is emptied" if kind == _DAMAGED else "cannot be written"
            _warn(f"the compilation cache {folder} {what}; programs are compiled again")

    with warnings.catch_warnings():
        warnings.filterwarnings("always", message="Error (reading|writing) persistent compilation cache")
        warnings.showwarning = shown
        try:
            yield
        finally:
            warnings.showwarning = show
            if _DAMAGED in reported:
                for path in (*folder.glob("*-cache"), *folder.glob("*-atime")):
                    with contextlib.suppress(OSError):
                        path.unlink()


def _warn(sentence: str) -> None:
    typer.echo(f"warning: {sentence}. --no-compile-cache turns the cache off.", err=True)
