"""Shows the progress of measurements: a bar on a terminal, otherwise lines."""

from __future__ import annotations

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ds_al.figures.terminal import Console


class Bar:
    """Context manager that shows progress.

    Args:
        total: sum of the amounts passed to :meth:`advance`: seconds, or a number of cases.
    """

    def __init__(self, console: Console, total: float) -> None:
        self.console, self.total = console, total
        columns = TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("left"), TimeRemainingColumn()
        self._progress = Progress(*columns, console=console, transient=True)

    def __enter__(self) -> Bar:
        self._progress.start()
        self._task = self._progress.add_task("starting", total=self.total)
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def advance(self, amount: float, line: str) -> None:
        """Advances the bar by ``amount`` and shows ``line``."""
        self._progress.update(self._task, advance=amount, description=line)
        if not self.console.is_terminal:
            print(line, flush=True)
