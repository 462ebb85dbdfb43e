"""Recorded runs of all methods, with their rows, figures and traces."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

from ds_al.figures import charts, timeline
from ds_al.figures.terminal import Console
from ds_al.studies.bench.cases import Row
from ds_al.studies.bench.profile import ProfileCases, Runs, profile_rows, record_runs, typical
from ds_al.studies.progress import Bar
from ds_al.trace import timelines
from ds_al.trace.files import write_trace

_SUFFIXES = (".png", ".svg")


@dataclass(frozen=True)
class Recorded:
    """Recorded runs and their rows.

    Attributes:
        runs: the timed runs.
        with_memory: one additional run per case with memory recording; empty for sleeping layers.
        rows: rows of :func:`~ds_al.studies.bench.profile.profile_rows`, with peak memory.
    """

    cases: ProfileCases
    runs: Runs
    with_memory: Runs
    rows: list[Row]

    @classmethod
    def of(cls, cases: ProfileCases, console: Console) -> Recorded:
        """Records all cases.

        Raises:
            RankFailure: a rank failed.
        """
        runs = _record(cases, console, what="recording")
        rows = profile_rows(runs, cases)
        if not cases.model:
            return cls(cases, runs, {}, rows)
        # Recording memory takes time, so the timed runs do not record it.
        counted = replace(cases, memory=True, repeat=1)
        with_memory = _record(counted, console, what="counting memory")
        peaks = {_case(row): row["peak_bytes"] for row in profile_rows(with_memory, counted)}
        return cls(cases, runs, with_memory, [{**row, "peak_bytes": peaks[_case(row)]} for row in rows])

    def draw(self, path: Path, micro_batches: int) -> list[Path]:
        """Draws a timeline of every method, with the expected bubble, and returns the files."""
        column, by = ("bubble_simulated", "simulated") if self.cases.model else ("bubble_formula", "formula")
        panels = []
        for method in self.cases.methods:
            own = [row for row in self.rows if (row["method"], row["micro_batches"]) == (method, micro_batches)]
            panels.append(
                timelines.timeline(
                    typical(self.runs[method, micro_batches]),
                    name=method,
                    micro_batches=micro_batches,
                    expected=mean(row[column] for row in own),
                    expected_by=by,
                )
            )
        return timeline.draw(panels, path, suffixes=_SUFFIXES)

    def draw_memory(self, path: Path, micro_batches: int) -> list[Path]:
        """Draws memory over time, if recorded, and returns the files."""
        if not self.with_memory:
            return []
        held = [
            timelines.memory(self.with_memory[method, micro_batches][0], name=method) for method in self.cases.methods
        ]
        return charts.draw(held, path, size=(11, 1.7), shared=True, suffixes=_SUFFIXES)

    def write_traces(self, folder: Path, micro_batches: int) -> list[Path]:
        """Writes the trace of one run per method below a folder, and returns the files."""
        written: list[Path] = []
        for method in self.cases.methods:
            about = {"method": method, "stages": self.cases.stages, "workload": self.cases.model or "sleeping"}
            events = typical(self.runs[method, micro_batches])
            place = folder / f"{method}-m{micro_batches}"
            written += write_trace(place, events, micro_batches=micro_batches, about=about)
        return written


def _record(cases: ProfileCases, console: Console, *, what: str) -> Runs:
    with Bar(console, cases.recordings) as bar:
        return record_runs(cases, progress=lambda line: bar.advance(1, f"{what}: {line}"))


def _case(row: Row) -> tuple[str, int, int]:
    return row["method"], row["micro_batches"], row["stage"]
