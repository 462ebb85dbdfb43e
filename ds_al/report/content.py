"""Builds the content of a report from runs, for both output formats."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ds_al.figures.parts import Content, Section, Table
from ds_al.report import facts, results, stages, texts
from ds_al.report.cells import Cell, group
from ds_al.report.compare import comparability
from ds_al.report.read import Profile, RunRecord
from ds_al.report.timelines import timeline

QUESTION = "Which method trains this network fastest to which accuracy?"
SLICES = 6000  # total over all timelines: about 0.6 MB in the page


def content(
    runs: Sequence[RunRecord],
    *,
    profiles: Sequence[Profile] = (),
    title: str | None = None,
    question: str | None = None,
) -> Content:
    """Builds all sections of a report.

    Args:
        runs: runs from :func:`ds_al.report.read.read`; at least one run or profile is required.
        profiles: profiles, for the table of bubbles.
        title: heading; by default the names of the runs.
        question: question that the report answers; by default :data:`QUESTION`.
    """
    cells = group(runs)
    names = dict.fromkeys(run.folder.parent.name for run in runs)
    sections: list[Section] = []
    if runs:
        sentences = comparability(runs)
        sections += [
            Section(
                "comparable",
                "Are these runs comparable?",
                paragraphs=()
                if sentences
                else (
                    "As far as recorded, data, epochs, seeds, hardware, versions and days are the same in all runs.",
                ),
                warnings=sentences,
            ),
            facts.section(runs, cells),
            results.methods(cells, comparable=not sentences),
            results.curves(cells),
            results.accuracy_in_time(cells),
            _timelines(cells),
            stages.memory(cells),
            stages.sent(cells),
            stages.idle(cells),
        ]
    if profiles:
        sections.append(_bubbles(profiles))
    if runs:
        sections.append(facts.environment(runs))
    sections.append(facts.commands(runs, profiles))
    return Content(
        title=title or f"Training report: {', '.join(names) or 'profiles'}",
        question=question or QUESTION,
        made=f"{time.strftime('%Y-%m-%d %H:%M')}, from {_count(len(runs), 'run')}"
        + (f" and {_count(len(profiles), 'profile')}" if profiles else ""),
        sections=sections,
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _timelines(cells: Sequence[Cell]) -> Section:
    traced = [(cell, next((run for run in cell.shown if run.trace), None)) for cell in cells]
    with_trace = [(cell, run) for cell, run in traced if run is not None]
    without = [cell.label for cell, run in traced if run is None]
    charts = []
    for number, (cell, run) in enumerate(with_trace, start=1):
        charts.append(timeline(run, label=cell.label, key=f"timeline-{number}", most=SLICES // len(with_trace)))
    paragraphs = []
    if charts:
        paragraphs.append("A row is a stage, from left to right in seconds.")
    if without:
        paragraphs.append(
            f"No trace was recorded for {', '.join(without)}: give run/train.py the flag --trace and make the report "
            "again."
        )
    return Section("timelines", "Timelines", paragraphs=paragraphs, charts=charts)


_BUBBLE_COLUMNS = (
    *("method", "stages", "micro_batches", "stage", "busy", "wait_input", "wait_queue", "wait_data"),
    *("wait_barrier", "drained", "other", "bubble", "bubble_formula"),
)


def _bubbles(profiles: Sequence[Profile]) -> Section:
    tables = []
    for profile in profiles:
        keys = dict.fromkeys(key for row in profile.rows for key in row)
        columns = [key for key in _BUBBLE_COLUMNS if key in keys] + [key for key in keys if key not in _BUBBLE_COLUMNS]
        rows = [[texts.plain(row.get(column)) for column in columns] for row in profile.rows]
        names = [column.replace("_", " ") for column in columns]
        numeric = frozenset(number for number, column in enumerate(columns) if column != "method")
        date = texts.plain(profile.header.get("date"))
        tables.append(Table(f"{profile.path.name}, {date}: {len(rows)} rows", names, rows, numeric))
    return Section(
        "bubble",
        "Bubble, measured beside the formula",
        paragraphs=(
            "Shares of the time of a run, on each stage. The bubble is the share in which the stage did not compute, "
            "whatever the cause; the formula counts nothing but forward and backward passes of equal length.",
        ),
        tables=tables,
    )
