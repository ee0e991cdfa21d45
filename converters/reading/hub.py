"""A folder, or an id of the Hugging Face hub -> a folder."""

from pathlib import Path

from jgptq.errors import CheckpointError

_SETTINGS = ["*.json", "tokenizer.model", "*.txt", "*.jinja"]
_WEIGHTS = ["*.safetensors"]
_TORCH_WEIGHTS = ["pytorch_model*.bin"]
"""Names of files that are fetched; torch's only where a repository has no safetensors. Code is never fetched."""


def resolve_folder(source: str | Path, revision: str | None = None) -> Path:
    """A local folder as it is; a hub id (`owner/name`) is fetched and its folder in the hub's cache returned.

    Args:
      source: a folder or a hub id.
      revision: a branch, tag or commit of the hub's repository; None for its main branch.

    Raises:
      CheckpointError: neither a folder nor an id that the hub knows, or a revision of a local folder.
    """
    try:
        folder = Path(source).expanduser()
        local, exists = folder.is_dir(), folder.exists()
    except (OSError, ValueError, RuntimeError) as error:  # no path at all: a null byte, an unknown user, a name too long
        raise CheckpointError(f"{str(source)!r}: not a folder ({error}); expected a folder or a hub id 'owner/name'") from error
    if local and revision is not None:
        raise CheckpointError(f"{source}: a local folder has no revision {revision!r}; revisions are of hub ids 'owner/name'")
    if local:
        return folder
    if exists or str(source).count("/") != 1 or str(source).startswith((".", "~", "/")):
        raise CheckpointError(f"{source}: not a folder; expected a folder with config.json and weights, or a hub id 'owner/name'")
    return _fetch(str(source), revision)


def _fetch(name: str, revision: str | None) -> Path:
    """The hub's files in its cache; torch's weights where there are no others."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=_SETTINGS + _WEIGHTS))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=_SETTINGS + _TORCH_WEIGHTS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        version = "" if revision is None else f" at revision {revision!r}"
        raise CheckpointError(
            f"{name}{version}: no such folder, and the hub could not provide it ({error}); check the name"
        ) from error
    return folder
