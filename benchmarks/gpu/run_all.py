"""All that has to be run on a GPU, as one command on a machine that has jax and nothing of this project installed.

    python benchmarks/gpu/run_all.py                       # 25 minutes at most
    python benchmarks/gpu/run_all.py --minutes 9           # what fits; it ends with the command for the rest
    python benchmarks/gpu/run_all.py --rehearse            # on a CPU, tiny shapes: that nothing fails for a typing error

Every entry of `entries.py` is a process with a time limit of its own; one that fails or hangs is reported and passed over.
Results are on the disk at any time, in $OUT if that is set, else in `benchmarks/results`: `gpu.json` holds every entry's status
and result, partial ones included, `gpu.log` the output of all, `gpu_target_config.pbtxt` what the compiler reads of the device.
The exit status is not zero where an entry about correctness did not pass; in a rehearsal, where any entry did not.
"""

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import paths
from entries import ENTRIES, Entry
from records import write_json

MINUTES = 25.0
SHORTEST = 20.0
"""Seconds that have to be left for an entry to be started."""
GRACE = 5.0
"""Seconds between asking a process to end and ending it."""
QUICK_TO_COMPILE = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
}
"""The environment of a rehearsal: what LLVM optimizes takes longer than tiny shapes save."""
PASSED, FAILED, TIMED_OUT, NOT_STARTED, UNFINISHED = "passed", "failed", "timed out", "not started", "unfinished"


@dataclasses.dataclass
class Done:
    """What became of an entry."""

    status: str
    seconds: float
    result: Any  # what its record holds; None where it wrote none
    tail: str  # the end of its output


def run_entry(
    entry: Entry, *, limit: float, folder: Path, environment: dict[str, str], options: Sequence[str], watch: Callable[[Any], None]
) -> Done:
    """Runs one entry to its end or its limit.

    Args:
      entry: what to run.
      limit: seconds.
      folder: for `gpu.log`, and its working directory.
      environment: of the process.
      options: added to its command.
      watch: called with the record whenever that has changed.

    Returns:
      What became of it.
    """
    with tempfile.TemporaryDirectory() as scratch, (folder / "gpu.log").open("ab") as log:
        record = Path(scratch) / "record.json"
        command = [sys.executable, *entry.command, "--record", str(record), *options]
        log.write(f"\n== {entry.name}: {' '.join(command)}\n".encode())
        log.flush()
        offset, started = log.tell(), time.monotonic()
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, cwd=folder, env=environment, start_new_session=True
        )
        seen: Any = None
        status: str | None = None
        while status is None:
            try:
                status = PASSED if process.wait(timeout=0.2) == 0 else FAILED
            except subprocess.TimeoutExpired:
                if time.monotonic() - started > limit:
                    _end(process)
                    status = TIMED_OUT
            if (now := _read(record)) != seen:
                seen = now
                watch(now)
        seconds = time.monotonic() - started
        output = (folder / "gpu.log").read_bytes()[offset:].decode(errors="replace")
        return Done(status, seconds, seen, "\n".join(output.splitlines()[-15:]))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and those that it started, which are a group of their own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=GRACE)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _read(record: Path) -> Any:
    return json.loads(record.read_text()) if record.exists() else None


def run_all(entries: Sequence[Entry], *, folder: Path, budget: float, rehearse: bool) -> dict[str, Any]:
    """Runs entries one after the other, and keeps `gpu.json` as it should be if this process ended now.

    Args:
      entries: what to run.
      folder: where results go; a `gpu.json` that is there keeps its other entries.
      budget: seconds for all of them together.
      rehearse: whether they run on a CPU.

    Returns:
      What `gpu.json` holds.
    """
    deadline = time.monotonic() + budget
    whole = _begun(entries, folder / "gpu.json", rehearse)
    with tempfile.TemporaryDirectory() as cache:
        quick = QUICK_TO_COMPILE | {"JAX_COMPILATION_CACHE_DIR": cache} if rehearse else {}
        for entry in entries:
            left, row = deadline - time.monotonic(), whole["entries"][entry.name]
            if left < min(SHORTEST, entry.seconds):
                break
            limit = min(entry.seconds, left)

            def watch(result: Any, row: dict[str, Any] = row) -> None:
                row |= {"status": UNFINISHED, "result": result}
                write_json(folder / "gpu.json", whole)

            print(f"== {entry.name} (at most {limit:.0f} s): {entry.proves}", flush=True)
            done = run_entry(
                entry,
                limit=limit,
                folder=folder,
                environment=paths.environment() | quick,
                options=["--rehearse"] if rehearse else [],
                watch=watch,
            )
            row |= {"status": done.status, "seconds": round(done.seconds, 1), "limit": round(limit, 1), "result": done.result}
            row["output"] = "" if done.status == PASSED else done.tail
            write_json(folder / "gpu.json", whole)
            print(f"{done.tail}\n{summary(whole['entries'])}", flush=True)
    return whole


def _begun(entries: Sequence[Entry], path: Path, rehearse: bool) -> dict[str, Any]:
    """What `gpu.json` holds before the first entry."""
    whole: dict[str, Any] = {"rehearsal": rehearse, "entries": {}}
    if path.exists() and (old := json.loads(path.read_text()))["rehearsal"] == rehearse:
        whole = old
    for entry in entries:
        row = {"status": NOT_STARTED, "proves": entry.proves, "correctness": entry.correctness, "result": None}
        whole["entries"][entry.name] = row
    write_json(path, whole)
    return whole


def summary(rows: dict[str, Any]) -> str:
    """One line an entry."""
    lines = [
        f"  {row['status']:12}{row.get('seconds', ''):>7}  {name}{' (correctness)' if row['correctness'] else ''}"
        for name, row in rows.items()
    ]
    return "\n".join(["summary: status, seconds, entry", *lines])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", nargs="+", choices=[entry.name for entry in ENTRIES], help="only these")
    parser.add_argument("--start", choices=[entry.name for entry in ENTRIES], help="only this one and those after it")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all entries together")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, tiny shapes")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or paths.ROOT / "benchmarks" / "results"))
    args = parser.parse_args()
    names = [entry.name for entry in ENTRIES]
    chosen = args.entries or names[names.index(args.start) if args.start else 0 :]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if args.rehearse and "OUT" not in os.environ else args.out
        folder.mkdir(parents=True, exist_ok=True)
        picked = [entry for entry in ENTRIES if entry.name in chosen]
        rows = run_all(picked, folder=folder.resolve(), budget=60 * args.minutes, rehearse=args.rehearse)["entries"]
    waiting = [name for name, row in rows.items() if row["status"] == NOT_STARTED]
    print(summary(rows))
    if waiting:
        print(f"there was no time for the rest: python benchmarks/gpu/run_all.py --entries {' '.join(waiting)}")
    wrong = [name for name, row in rows.items() if row["correctness"] and row["status"] != PASSED]
    if wrong:
        print(f"not shown to be correct: {', '.join(wrong)}")
    if args.rehearse:
        wrong += [name for name, row in rows.items() if row["status"] != PASSED]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
