"""A progress bar for measurements, and lines where there is no terminal."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Bar:
    """A context in which progress is shown.

    Args:
        total: of the amounts that :meth:`advance` will be given: seconds, or a number of cases.
    """

    def __init__(self, console: Console, total: float) -> None:
        self.console, self.total = console, total
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("left"), TimeRemainingColumn()
        self._progress = Progress(*columns, console=console, transient=True)

    def __enter__(self) -> Bar:
        self._progress.start()
        self._task = self._progress.add_task("starting", total=self.total)
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def advance(self, amount: float, line: str) -> None:
        """Shows that so much more is done, and what it was."""
        self._progress.update(self._task, advance=amount, description=line)
        if not self.console.is_terminal:
            print(line, flush=True)
