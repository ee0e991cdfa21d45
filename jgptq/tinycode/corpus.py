"""The Python standard library's source as text, split by file into a training and a held-out part."""

import hashlib
import sysconfig
from pathlib import Path
from typing import Literal

from jgptq.errors import CalibrationError

# Folders of tables and texts rather than code, of repetitive tests, and of what is not the standard library.
_LEFT_OUT = {"test", "tests", "site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__", "ensurepip"}
_HELD_OUT_OF = 20


def stdlib_documents(part: Literal["train", "held_out"]) -> list[str]:
    """The source files of one part, in the order of their paths.

    A hash of its path decides which part a file belongs to, so that it is the same in every version of Python; one file in 20 is
    held out.

    Args:
      part: which part.

    Returns:
      Texts of whole files.

    Raises:
      CalibrationError: this interpreter is installed without the source of its library.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _LEFT_OUT & set(relative.parts):
            continue
        digest = hashlib.sha256(relative.as_posix().encode()).digest()
        if (digest[0] % _HELD_OUT_OF == 0) == (part == "held_out"):
            documents.append(path.read_text(encoding="utf-8", errors="replace"))
    if not documents:
        raise CalibrationError(
            f"no Python source under {root}: this interpreter is installed without it; use a full installation of Python"
        )
    return documents
