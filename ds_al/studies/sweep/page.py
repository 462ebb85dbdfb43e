"""Writes the results of a sweep as two pages: what to decide by, and all tables of each group."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_al.figures.parts import Table
from ds_al.studies.results import Row, origin
from ds_al.studies.runs import Result
from ds_al.studies.sweep.spec import Run
from ds_al.studies.tables import sweep as tables
from ds_al.studies.tables.write import document, groups

INTRODUCTION = """\
# Results

All methods of a group use the same network, data, number of samples and number of steps; optimizer and learning rate
were chosen for each method on validation samples ([accuracy.md](accuracy.md)). Test accuracy is that of the **last
epoch**, mean and sample standard deviation over seeds; `bp` is the backprop twin: back-propagation through the same
blocks. [{groups}]({groups}) has all tables of each group: accuracy along the training, time, operations, exits.
"""

FIXED = "The suite sets the number of epochs of each group; back-propagation may gain by more of them."

DECISION = """\
## What to decide by

Difference to the twin in test accuracy, in points: of the last exit, and in brackets of the mean softmax of all exits,
whose bridges training needs in any case. Of several twins the one with the best validation accuracy counts. *FLOPs* are
counted over forward and backward at the largest K, relative to the twin's. A dash: fewer than {seeds} seeds, which
support no conclusion.
{whole}"""

WHOLE = """\
K = 1 is exact back-propagation through all blocks with a method's losses and head: what K = 2 and more differ from it
is due to local training, what it differs from the twin is not.
"""

GROUPS = """\
# Results of each group

[{page}]({page}) has what to decide by. *At best validation* is the test accuracy of the epoch with the highest
validation accuracy; *after epoch 1* is the validation accuracy after the first epoch. *All exits averaged* uses the
mean softmax of the exits of all layers; the twin has one exit. FLOPs are counted over forward and backward, relative to
the twin's. The runs shared a machine with others, so times are only roughly comparable, and only within a table; a
method that ran on another machine than the twin, or after its restart, has none.

Rows with fewer than {seeds} seeds are unfinished: they support no conclusion, and their difference to the twin is
omitted.
"""

ALONG = (
    "Validation accuracy minus the twin's, in points, when each has spent a share of what the twin spends in all, of "
    "samples, operations or seconds (standard error; *level*: at most 0.3 points; *open*: at most twice the error):"
)

EXITS = (
    "Test accuracy and cost, as a share of the operations of the full inference path: when all samples leave at one "
    "exit, for the mean of the last exits (if evaluated), and when each sample leaves at the first exit whose largest "
    "softmax probability reaches a threshold:"
)


def results_page(
    runs: Sequence[Run],
    done: Sequence[bool],
    *,
    waits: Sequence[str],
    table: Sequence[Row],
    pictures: Mapping[str, Path],
    header: Mapping[str, Any],
    seeds: int,
    page: Path,
    groups_page: Path,
    budget: str = "",
) -> str:
    """Returns the page of what to decide by, in Markdown.

    Args:
        runs: all runs of the sweep.
        done: whether each run has a result.
        waits: groups that have no runs yet.
        table: rows of :func:`~ds_al.studies.sweep.table.rows`.
        pictures: figure of each group.
        header: header of the results file: date, command, machine, versions.
        seeds: number of seeds of the sweep.
        page: path of the page, for relative links to the figures.
        groups_page: path of the page of all groups.
        budget: sentences on how the epochs of each group were found; empty where the sweep sets them.
    """
    asked = [
        {
            "group": run.group, "method": run.method, "K": run.layers, "seed": run.seed,
            "epochs": run.config["experiment"]["epochs"], "done": there,
        }
        for run, there in zip(runs, done, strict=True)
    ]  # fmt: skip
    blocks: list[Table | str] = [
        INTRODUCTION.format(groups=groups_page.name),
        textwrap.fill(budget or FIXED, 118),
        DECISION.format(seeds=seeds, whole=WHOLE if any(row["K"] == 1 for row in table) else ""),
        tables.decision(table, seeds=seeds),
        "## Runs", tables.missing(asked, waits), "## Figures",
    ]  # fmt: skip
    blocks += [_picture(group, file, page) for group, file in pictures.items()]
    blocks.append(
        f"{origin(header)} `docs/results/<sweep>.runs.jsonl` holds one line per run: config, versions and curve."
    )
    return document(*blocks)


def groups_page(
    *,
    results: Sequence[Result],
    table: Sequence[Row],
    exits: Sequence[Row],
    curves: Sequence[Row],
    header: Mapping[str, Any],
    seeds: int,
    page: Path,
) -> str:
    """Returns the page of all tables of each group, in Markdown.

    Args:
        results: results of the runs.
        table: rows of :func:`~ds_al.studies.sweep.table.rows`.
        exits: rows of :func:`~ds_al.studies.sweep.exits.exit_table`.
        curves: rows of :func:`~ds_al.studies.sweep.along.along`.
        header: header of the results file: date, command, machine, versions.
        seeds: number of seeds of the sweep.
        page: path of the page of what to decide by.
    """
    blocks: list[Table | str] = [GROUPS.format(page=page.name, seeds=seeds)]
    for own in groups(table, "group"):
        group = own[0]["group"]
        blocks += [f"## {group}", tables.group(own, seeds=seeds), _origin(results, group)]
        if spent := [row for row in curves if row["group"] == group]:
            blocks += [ALONG, tables.along(spent)]
        if found := tables.exits(exits, group):
            blocks += [EXITS, *found]
    return document(*blocks, origin(header))


def _picture(group: str, file: Path, page: Path) -> str:
    link = os.path.relpath(file, page.parent)
    return f"![{group}: accuracy over epochs, time and operations, by number of layers, by exit]({link})"


def _origin(results: Sequence[Result], group: str) -> str:
    """Describes when and on which machine a group was run, which may differ from those of the page."""
    own = [result for result in results if result["group"] == group and "failure" not in result]
    days = sorted({result["date"][:10] for result in own})
    machines = dict.fromkeys(f"{result['cores']} cores ({result['cpu']})" for result in own)
    return f"Runs of {' to '.join(dict.fromkeys((days[0], days[-1])))}, {'; '.join(machines)}."
