"""The demonstration of recovery: a stage is killed twice over a slow link, and the run ends as if nothing had happened.

    1. streaming, undisturbed             2. streaming, stage 1 killed twice      3. 1F1B, stage 1 killed
       accuracy, hash of each stage          the same accuracy and hashes            the job ends

All are jobs of DeepSpeed's launcher (:mod:`ds_al.studies.bench.recovery_job`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ds_al.experiment.live import stage_table
from ds_al.figures.terminal import Console
from ds_al.figures.timeline import draw
from ds_al.launch.ranks import free_port
from ds_al.studies.bench.recovery_job import Ended, Job, launch, lines, result
from ds_al.studies.deaths import TRAINED, Line, deaths, timeline
from ds_al.trace import StageMetrics

LINK = {"delay_ms": 20.0, "mbit": 300.0}
_TIMEOUT = 600.0  # seconds of a job
_BIN, _BINS = 0.5, 72  # seconds of a character of the live view, and characters
_MARKS = {"trains": ("█", "cyan"), "again": ("▒", "magenta"), "killed": ("X", "bold red"), "waits": ("·", "dim")}


def demonstrate(folder: Path, picture: Path, console: Console, *, batches: int) -> bool:
    """Runs the three jobs, and draws them.

    Args:
        folder: for their files.
        picture: the PNG file to write.
        batches: length of the jobs.

    Returns:
        Whether the first two end on the same accuracy and hashes, and the third one has ended with an error.
    """
    plain = Job(str(folder / "undisturbed"), batches=batches, link=LINK, every=10**9)
    total = batches * plain.micro_batches
    kills = [(1, round(0.35 * total)), (1, round(0.7 * total))]
    jobs = {
        "streaming, undisturbed": plain,
        "streaming, stage 1 killed twice": replace(
            plain, folder=str(folder / "killed"), recovers=True, every=8 * plain.micro_batches, kills=kills
        ),
        "1F1B, stage 1 killed: the job ends": replace(
            plain, folder=str(folder / "1f1b"), method="bp_1f1b", kills=kills[:1]
        ),
    }
    ended = {title: _run(title, job, console) for title, job in jobs.items()}
    *streaming, (title, backprop) = jobs.items()
    for name, _ in streaming:
        if ended[name].exits[-1][1]:
            console.print(ended[name].output[-3000:], highlight=False)
            return False
    own, other = (result(Path(job.folder)) for _, job in streaming)
    console.print(_compared(own, other))
    code, done = ended[title].exits[-1][1], _position(lines(Path(backprop.folder), 0))
    console.print(f"1F1B: the launcher ended with exit code {code} after {done} of {total} micro-batches")
    if not done:
        console.print(ended[title].output[-3000:], highlight=False)
        return False
    draw([timeline(name, job) for name, job in jobs.items()], picture)
    console.print(f"picture: {picture}")
    return own == other and code != 0


def _run(title: str, job: Job, console: Console) -> Ended:
    console.rule(title, align="left")
    with View(job, console) as view:
        return launch(job, port=free_port(), again=False, timeout=_TIMEOUT, look=view.look)


def _compared(own: Mapping[str, Any], other: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("streaming", "undisturbed", "killed twice", ""):
        table.add_column(column)
    pairs = [("accuracy", f"{own['accuracy']:.4f}", f"{other['accuracy']:.4f}", own["accuracy"] == other["accuracy"])]
    for stage, (one, two) in enumerate(zip(own["hashes"], other["hashes"], strict=True)):
        pairs.append((f"weights of stage {stage}", one[:16], two[:16], one == two))
    for name, first, second, equal in pairs:
        table.add_row(name, first, second, "equal" if equal else "DIFFERENT")
    return table


def _position(own: Sequence[Line]) -> int:
    """Micro-batches that a stage has trained."""
    return max((line["number"] + 1 for line in own if line["what"] == TRAINED), default=0)


class View:
    """Shows a job while it runs: metrics of the stages, and when each has trained. Without a terminal, deaths alone.

    Args:
        job: the job.
        console: where it is shown.
    """

    def __init__(self, job: Job, console: Console) -> None:
        self._job, self._console = job, console
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._due, self._told = 0.0, set[str]()

    def __enter__(self) -> View:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._due = 0.0
        self.look()
        if self._live is not None:
            self._live.stop()

    def look(self) -> None:
        """Reads what the ranks have written, twice a second."""
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + _BIN
        by_stage = [lines(Path(self._job.folder), stage) for stage in range(self._job.stages)]
        for stage, own in enumerate(by_stage):
            for death in deaths(own):
                self._tell(f"stage {stage}: its process is killed at micro-batch {death.micro_batch}")
                if death.back is not None:
                    later = f"{death.back - death.killed:.1f} s later"
                    self._tell(f"stage {stage}: another one has trained micro-batch {death.micro_batch}, {later}")
        if self._live is not None:
            self._live.update(Group(_metrics(by_stage), *map(_strip, range(len(by_stage)), by_stage)), refresh=True)

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._console.print(text, highlight=False)


def _metrics(by_stage: Sequence[Sequence[Line]]) -> Table:
    latest = {
        stage: next(line for line in reversed(own) if line["what"] == "metrics")
        for stage, own in enumerate(by_stage)
        if any(line["what"] == "metrics" for line in own)
    }
    metrics = {stage: StageMetrics(*line["values"]) for stage, line in latest.items()}
    busy = {stage: each.busy for stage, each in metrics.items()}
    return stage_table(metrics, busy, [line["losses"] for line in latest.values()], None)


def _strip(stage: int, own: Sequence[Line]) -> Text:
    """What a stage has done lately, a character per half second: the hole of a death, and how it closes."""
    now, most = time.time(), -1
    found = ["waits"] * _BINS
    for line in own:
        place = _BINS - 1 - int((now - line["moment"]) / _BIN)
        again = line["what"] == TRAINED and line["number"] <= most
        if line["what"] == TRAINED:
            most = max(most, line["number"])
        if place >= 0 and (line["what"] == TRAINED or line["what"] == "killed"):
            found[place] = "killed" if line["what"] == "killed" else "again" if again else "trains"
    return Text.assemble(f"stage {stage} ", *(_MARKS[each] for each in found), f" {_position(own)}")
