"""The files of a checkpoint folder: regular files that lie in it, or where the hub's cache keeps them."""

from pathlib import Path

from jgptq.errors import CheckpointError


def regular_file(folder: Path, name: str, missing: str) -> Path:
    """The path of a file in a folder, once it is known to be a regular file of that folder.

    The hub's cache has `snapshots/<revision>/<name>` as links to `blobs/<hash>` of the same repository; these are followed. Other
    links are followed as long as they stay in the folder.

    Args:
      folder: the checkpoint folder.
      name: the name of a file in it.
      missing: the message where there is no such file.

    Raises:
      CheckpointError: there is no such file, it is no regular file, or a link leads out of the folder.
    """
    path = folder / name
    try:
        real, home = path.resolve(strict=True), folder.resolve(strict=True)
        if not real.is_file():
            raise CheckpointError(f"{path}: expected a file, found a folder or a device")
    except FileNotFoundError:
        raise CheckpointError(missing) from None
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links in a circle
        raise CheckpointError(f"{path}: cannot be opened ({error})") from error
    if not any(real.is_relative_to(place) for place in (home, *_blobs(home))):
        raise CheckpointError(f"{path}: a link out of the folder, to {real}; refusing to read it, copy the file into the folder")
    return path


def _blobs(home: Path) -> list[Path]:
    """Where the hub's cache keeps the files of a snapshot; empty for other folders."""
    return [home.parent.parent / "blobs"] if home.parent.name == "snapshots" else []
