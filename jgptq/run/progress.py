"""A progress bar over the stages of a run."""

import sys
from types import TracebackType


class Progress:
    """Draws a bar on standard error while its `with` block runs.

    Args:
      total: stages in the run.
      shown: whether to draw; None draws only on a terminal.
    """

    def __init__(self, total: int, shown: bool | None = None):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        drawn = sys.stderr.isatty() if shown is None else shown
        self._bar = Bar(*columns, console=Console(stderr=True), disable=not drawn)
        self._task = self._bar.add_task("quantizing", total=total)

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def describe(self, text: str) -> None:
        """Says what is being done."""
        self._bar.update(self._task, description=text)

    def advance(self, text: str | None = None, stages: int = 1) -> None:
        """Counts finished stages."""
        self._bar.update(self._task, advance=stages, description=text)
