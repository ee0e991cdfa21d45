"""Damages folders and reads them.

    PYTHONPATH=tests/support python -m fuzz --cases 20000 --seed 0

Each case damages one of the folders of `fuzz.folders` by one to three changes of `fuzz.mutations`. It passes where `load_hf`
raises a `JgptqError` with a message that can be printed, or where every leaf of the decoder is, bit for bit, what the libraries
of the file formats read from the damaged folder; where these refuse it, what it held before. Any other exception, a case of
more than 30 seconds, or a process of more than 4 GiB of memory beyond what it starts with is a failure. A failure prints its
case; `--case` runs one again.
"""

import argparse
import collections
import contextlib
import json
import random
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

from converters import load_hf
from fuzz.folders import Files, originals
from fuzz.mutations import CHANGES
from fuzz.readers import Tensors, differences, stored
from jgptq.errors import JgptqError

SECONDS, MEMORY, LONGEST = 30, 4 * 2**30, 20_000


def outcome(files: Files, folder: Path, before: Tensors | None = None) -> str:
    """The word refused, or read where the leaves are what the files hold; raises whatever else happens.

    Args:
      files: the files, damaged or not.
      folder: an empty folder to write them to.
      before: what the folder held before it was damaged, for a damage that only other readers object to.
    """
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    try:
        decoder = load_hf(folder)
    except JgptqError as error:
        message = str(error)
        assert 0 < len(message.encode()) < LONGEST, f"a message of {len(message)} characters"
        assert str(folder) in message or "config.json" in message, f"a message that names no file: {message}"
        return "refused"
    tensors = held(folder, before)
    wrong = list(differences(decoder, tensors, version_of(folder)))
    assert not wrong, "; ".join(wrong)
    return "read"


def held(folder: Path, before: Tensors | None = None) -> Tensors:
    """What a folder holds by the libraries of the formats, or, where they refuse it, what it held before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, on pickles of other protocols
        try:
            return stored(folder)
        except Exception:
            if before is None:
                raise
            return before


def version_of(folder: Path) -> str:
    """The version of GPTQ that a folder declares."""
    config = json.loads((folder / "config.json").read_text())
    declared = config.get("quantization_config")
    if declared is None and (folder / "quantize_config.json").exists():
        declared = json.loads((folder / "quantize_config.json").read_text())
    return (declared or {}).get("checkpoint_format") or (declared or {}).get("format") or "gptq"


@contextlib.contextmanager
def deadline() -> Iterator[None]:
    """Raises a TimeoutError in a case that does not end."""

    def late(*_: object) -> None:
        raise TimeoutError(f"no end after {SECONDS} seconds")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


def limit_memory() -> None:
    """More than `MEMORY` beyond what the process has mapped now is a MemoryError."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, resource.RLIM_INFINITY))


def damaged(seed: int, case: int, folders: dict[str, Files]) -> tuple[Files, list[str]]:
    """The files of a case, and what was done to them: the name of the folder, then the changes."""
    rng = random.Random(f"{seed} {case}")
    name = rng.choice(sorted(folders))
    files, done = dict(folders[name]), [name]
    for _ in range(rng.choice([1, 1, 2, 3])):
        if files:
            done.append(rng.choice(CHANGES)(rng, files))
    return files, done


def run(seed: int, cases: range) -> collections.Counter[str]:
    """Runs cases and prints those that fail; the number of each outcome, and by how much the memory grew."""
    folders, before, counts = originals(), dict[str, Tensors](), collections.Counter[str]()
    for name, files in folders.items():
        with tempfile.TemporaryDirectory() as scratch:
            assert outcome(files, Path(scratch)) == "read", f"{name} cannot be read undamaged"
            before[name] = held(Path(scratch))
    limit_memory()
    start = peak_memory()
    for case in cases:
        if case % 1000 == 0:
            print(f"at case {case}: {dict(counts)}", file=sys.stderr, flush=True)
        files, done = damaged(seed, case, folders)
        try:
            with tempfile.TemporaryDirectory() as scratch, deadline():
                counts[outcome(files, Path(scratch), before[done[0]])] += 1
        except Exception:
            counts["failed"] += 1
            print(f"case {case} of seed {seed}: {'; '.join(done)}\n{traceback.format_exc()}", flush=True)
    counts["MiB"] = (peak_memory() - start) // 2**20
    return counts


def peak_memory() -> int:
    """The most bytes that the process had in memory at any time."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000, help="number of cases")
    parser.add_argument("--seed", type=int, default=0, help="seed of the damage")
    parser.add_argument("--case", type=int, help="run this case alone")
    args = parser.parse_args()
    counts = run(args.seed, range(args.cases) if args.case is None else range(args.case, args.case + 1))
    cases = f"{counts['refused']} refused, {counts['read']} read as they are, {counts['failed']} failed"
    print(f"{cases}; memory grew by {counts['MiB']} MiB")
    sys.exit(1 if counts["failed"] else 0)


if __name__ == "__main__":
    main()
