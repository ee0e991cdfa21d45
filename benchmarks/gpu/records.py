"""What the scripts of this folder share: their arguments, the result that they write as they go, and what they ran on."""

import argparse
import json
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from paths import ROOT

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "flax", "numpy", "transformers")


def arguments(description: str | None, parts: tuple[str, ...] = ()) -> argparse.ArgumentParser:
    """The arguments that every script takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if parts:
        parser.add_argument("part", choices=parts)
    parser.add_argument("--record", type=Path, help="JSON file that holds the result so far, at any time")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU: tiny shapes, kernels in Pallas' interpreter")
    return parser


class Record:
    """A result that is on the disk after every change, so that a process that is killed leaves what it had.

    Args:
      path: where to; None only prints.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.data: dict[str, Any] = {}

    def put(self, **facts: Any) -> None:
        """Sets entries."""
        self.data |= facts
        self._save(facts)

    def add(self, name: str, row: Any) -> None:
        """Appends to a list."""
        self.data.setdefault(name, []).append(row)
        self._save(row)

    def _save(self, shown: Any) -> None:
        print(json.dumps(rounded(shown)), flush=True)
        if self.path is not None:
            write_json(self.path, self.data)


def write_json(path: Path, data: Any) -> None:
    """Replaces a file as a whole: a reader never sees half of it."""
    scratch = path.with_name(f".{path.name}")
    scratch.write_text(json.dumps(data, indent=1) + "\n")
    scratch.replace(path)


def rounded(value: Any) -> Any:
    """The same JSON value with floats of four significant digits, for a terminal."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def require_gpu(rehearse: bool) -> None:
    """Ends the process where there is no NVIDIA GPU: figures of a CPU must never be taken for those of one.

    Raises:
      SystemExit: there is none, and this is no rehearsal.
    """
    import jax

    device = jax.devices()[0]
    if not rehearse and device.platform not in ("gpu", "cuda"):
        raise SystemExit(f"expected an NVIDIA GPU, found {device.platform}; try --rehearse, which needs none")


def environment() -> dict[str, Any]:
    """The device, the versions and the commit."""
    import jax

    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "platform_version": device.client.platform_version,
        "compute_capability": str(getattr(device, "compute_capability", "")),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": commit(),
    }


def commit(root: Path = ROOT) -> str:
    """The commit: of git where it is there, else the first line of a file COMMIT in the root, else "unknown"."""
    if shutil.which("git") and (root / ".git").exists():
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
        changed = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=False)
        if head.returncode == 0:
            return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")
    path = root / "COMMIT"
    return path.read_text().split("\n")[0].strip() if path.exists() else "unknown"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
