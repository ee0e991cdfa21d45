"""A folder that is written whole or not at all: it grows under a temporary name and is renamed when everything is on the disk."""

import errno
import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from jgptq.errors import OutputError

JOURNAL = "progress.jsonl"
"""In a folder that is not whole yet: the run that writes it, and the blocks that it has finished."""
ORBAX = "orbax"
"""The checkpoint inside a folder of format `orbax`."""


def partial_folder(out: Path) -> Path:
    """Where `out` grows until it is whole."""
    return out.with_name(out.name + ".partial")


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Refuses to write where something is.

    Raises:
      OutputError: `out` exists and may not be replaced, or is no folder.
    """
    if os.path.lexists(out) and (out.is_symlink() or not out.is_dir()):
        raise OutputError(errno.EEXIST, f"{out} exists and is a file or a link; choose another folder")
    if out.exists() and not overwrite:
        raise OutputError(
            errno.EEXIST, f"{out} exists; choose another folder, or pass --overwrite (overwrite=True) to replace it"
        )


def refuse_unfinished(out: Path, overwrite: bool) -> None:
    """Refuses to write where a run was stopped that could be resumed.

    Raises:
      OutputError: there is one, and it may not be dropped.
    """
    if (partial_folder(out) / JOURNAL).exists() and not overwrite:
        message = f"{partial_folder(out)} holds an unfinished run; finish it, delete it, or pass overwrite=True"
        raise OutputError(errno.EEXIST, message)


class PartialFolder:
    """Files under `<out>.partial`; `finish` makes it `out`.

    Args:
      out: the folder to make.
      needed: bytes that its files will take.
    """

    def __init__(self, out: Path, needed: int):
        self.out = out
        self.folder = partial_folder(out)
        self.needed = needed

    def make(self, *, clear: bool) -> None:
        """Makes the temporary folder.

        Args:
          clear: remove what another write left there.

        Raises:
          OutputError: it cannot be made, or what is there is nobody's to remove.
        """
        if clear:
            self._clear()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(error.errno, f"{self.folder} cannot be made: {error.strerror}; choose another place") from error

    def check_space(self) -> None:
        """Raises an OSError if the disk has no room for the files, for a writer that cannot reserve it."""
        if shutil.disk_usage(self.folder).free < self.needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sync(self) -> None:
        """Forces what was written to the disk, the lists of files of the folders included."""
        for path in (*self.folder.rglob("*"), self.folder):
            self.guard(path.name, functools.partial(_sync_path, path))

    def write_text(self, name: str, text: str) -> None:
        """Writes a small file into the folder."""
        self.guard(name, lambda: (self.folder / name).write_text(text, encoding="utf-8"))

    def finish(self) -> Path:
        """Renames the folder: from here on it is whole.

        Returns:
          The folder.
        """
        self.sync()
        self.guard("", self._rename)
        return self.out

    def guard(self, file: str, action: Callable[[], object]) -> None:
        """Runs an action on a file of the folder; a full disk becomes an error that says what is needed.

        Raises:
          OutputError: the action raised an OSError.
        """
        try:
            action()
        except OSError as error:
            free = shutil.disk_usage(self.folder).free
            message = f"{self.folder / file}: {error.strerror}; the result needs {self.needed} bytes, {free} are free. "
            advice = "Free some space, or choose another disk, and run it again: a run resumes after the last finished block"
            raise OutputError(error.errno, message + advice) from error

    def _rename(self) -> None:
        if self.out.exists():
            with tempfile.TemporaryDirectory(dir=self.out.parent, prefix=f"{self.out.name}.replaced.") as scratch:
                self.out.rename(Path(scratch) / "old")
                self.folder.rename(self.out)
        else:
            self.folder.rename(self.out)
        _sync_path(self.out.parent)

    def _clear(self) -> None:
        """Removes what another write left, and nothing that is not one's own."""
        if not self.folder.exists():
            return
        names = [path.name for path in self.folder.iterdir()]
        if names and not any((name.startswith("model") and name.endswith(".safetensors")) or name == ORBAX for name in names):
            raise OutputError(errno.EEXIST, f"{self.folder} is in the way and no run made it; move it, or choose another name")
        shutil.rmtree(self.folder)


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
