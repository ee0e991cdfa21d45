"""Uploads a finished folder to the Hugging Face hub."""

import re
from pathlib import Path

from converters.checkpoint import INDEX, SINGLE
from converters.output.folders import JOURNAL, ORBAX
from jgptq.errors import ConfigError, OutputError


def push_to_hub(
    folder: str | Path, repo_id: str, *, private: bool = False, revision: str | None = None, message: str | None = None
) -> str:
    """Uploads a folder that `save_hf`, `convert` or `jgptq quantize` wrote, with its model card (README.md).

    Args:
      folder: the folder, finished.
      repo_id: "owner/name"; the repository is made if it does not exist.
      private: whether a repository that is made is private.
      revision: the branch; by default the repository's main one.
      message: of the commit; by default one that names this project.

    Returns:
      The address of the commit.

    Raises:
      ConfigError: not a finished folder, or not "owner/name".
      OutputError: the hub refused the upload, or could not be reached.
    """
    path = _finished(Path(folder))
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ConfigError(f"repo_id must be 'owner/name', found {repo_id!r}")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=path, revision=revision, commit_message=message or f"Upload {path.name} with jgptq"
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise OutputError(
            f"{repo_id}: the hub did not take {path} ({error}); check the name, and log in with `hf auth login`"
        ) from error
    return str(commit.commit_url)


def _finished(folder: Path) -> Path:
    """The folder, if it holds a whole checkpoint."""
    if (folder / JOURNAL).exists():
        raise ConfigError(f"{folder} holds an unfinished run; repeat its command to finish it")
    weights = (SINGLE, INDEX, ORBAX)
    if not (folder / "config.json").is_file() or not any((folder / name).exists() for name in weights):
        raise ConfigError(f"{folder}: expected config.json and one of {', '.join(weights)}; push a folder that was written whole")
    return folder
