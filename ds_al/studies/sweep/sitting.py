"""One sitting of a sweep: executes runs with a progress bar, as many as fit in a time, and tells what is left."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ds_al.figures.terminal import Console
from ds_al.launch.ranks import start_quickly
from ds_al.studies.runs import Result, RunFile
from ds_al.studies.sweep.runner import execute, is_done
from ds_al.studies.sweep.spec import Run


@dataclass(frozen=True)
class Sitting:
    """How the runs of a sweep are executed.

    Attributes:
        file: file of results.
        script: ``run/train.py``.
        data: root folder of the sweep's relative data paths, or ``None``.
        jobs: number of concurrent runs; by default one process per core.
        timeout: seconds before a run is terminated and counts as failed.
        minutes: no run starts that would not end within this time, as far as is known; ``None`` for no limit.
        console: where progress is shown.
    """

    file: RunFile
    script: Path
    data: Path | None
    jobs: int | None
    timeout: float
    minutes: float | None
    console: Console

    def work(self, runs: Sequence[Run]) -> None:
        """Executes the runs that have no result yet, and tells the estimated time of those that are left."""
        from deepspeed.accelerator import get_accelerator  # imports all of DeepSpeed

        forks = get_accelerator().device_name() == "cpu"  # an accelerator context does not survive a fork
        if forks:
            start_quickly()
        until = None if self.minutes is None else time.monotonic() + 60 * self.minutes
        found = self.file.read()
        left = [run for run in runs if not is_done(run, found)]
        jobs = self.jobs or max(1, (os.cpu_count() or 1) // max((run.stages for run in left), default=1))
        self._tell(left, jobs)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console) as bar:
            task = bar.add_task("starting", total=len(runs), completed=len(runs) - len(left))

            def done(run: Run, result: dict[str, Any]) -> None:
                bar.update(task, advance=1, description=run.title)
                self.console.print(f"{run.title}: {_outcome(result)}", highlight=False, soft_wrap=True)

            try:
                execute(
                    left,
                    file=self.file,
                    script=None if forks else self.script,
                    data=None if self.data is None else self.data.resolve(),
                    jobs=jobs,
                    timeout=self.timeout,
                    done=done,
                    starts=lambda run: until is None or self._fits(run, until=until),
                )
            except KeyboardInterrupt:
                self.console.print("stopped; the same command goes on from here")
        found = self.file.read()
        self._tell([run for run in runs if not is_done(run, found)], jobs)

    def _fits(self, run: Run, *, until: float) -> bool:
        """Returns whether a run that starts now ends in time, as far as is known."""
        expected = expected_seconds(run, self.file.read())
        return time.monotonic() + (expected or 0.0) < until

    def _tell(self, left: Sequence[Run], jobs: int) -> None:
        if left:
            self.console.print(time_left(left, self.file.read(), jobs=jobs), highlight=False, soft_wrap=True)


def expected_seconds(run: Run, found: Mapping[str, Result]) -> float | None:
    """Returns the seconds that a run probably takes: those per epoch of finished runs of the same group, method and K,
    or else of the same group, times its epochs; ``None`` if there is none.

    Args:
        run: the run.
        found: results of finished runs.
    """
    done = [r for r in found.values() if "failure" not in r and r["group"] == run.group and r.get("seconds")]
    alike = [r for r in done if (r["suite_method"], r["K"], r["P"]) == (run.method, run.layers, run.stages)]
    if not done:
        return None
    per_epoch = statistics.mean(r["seconds"] / r["epochs"] for r in alike or done)
    return float(per_epoch * run.config["experiment"]["epochs"])


def time_left(runs: Sequence[Run], found: Mapping[str, Result], *, jobs: int) -> str:
    """Describes how many runs are left and how long they take together."""
    expected = [expected_seconds(run, found) for run in runs]
    known = [seconds for seconds in expected if seconds is not None]
    unknown = len(expected) - len(known)
    if not known:
        return f"{len(runs)} runs left, whose time is not known yet, {jobs} at a time"
    minutes = sum(known) / jobs / 60
    told = f"{len(runs)} runs left, about {minutes:.0f} min with {jobs} at a time"
    return told + (f", and {unknown} whose time is not known yet" if unknown else "")


def _outcome(result: Mapping[str, Any]) -> str:
    if "failure" in result:
        return "failed"
    part = "validation" if result["test_accuracy"] is None else "test"
    return f"{part} accuracy {result[f'{part}_accuracy'][-1]:.4f}"
