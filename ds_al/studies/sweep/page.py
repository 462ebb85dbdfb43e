"""A sweep's results as a page: what is there, what is missing, tables and figures; all from the same runs."""

from __future__ import annotations

import os
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

Same network, same data, same number of samples and steps; the optimizer and learning rate of each method are its
own, chosen on validation samples ([accuracy.md](accuracy.md)). Test accuracy is that of the **last epoch**, mean and
sample standard deviation over seeds; *at best validation* is the epoch that the validation samples would have chosen,
*after epoch 1* the validation accuracy that the first epoch brought. *All exits averaged* is the mean of the softmax of
all layers' exits, whose bridges have been trained anyway; the twin has one exit.
`bp` is back-propagation through the same blocks, the twin. FLOPs are counted, forward and backward, over the twin's.
Seconds are of runs that shared a machine with others: compare them within a table, roughly.

Rows with fewer than {seeds} seeds are unfinished: nothing is to be concluded from them, and their difference to the
twin is left out.
"""

EXITS = (
    "Test accuracy at each exit, at the share of the full path's operations; of the mean of the last ones, where it "
    "was looked at; and where each sample leaves at the first exit whose softmax is so confident of a class:"
)


def results_page(
    runs: Sequence[Run],
    done: Sequence[bool],
    *,
    waits: Sequence[str],
    results: Sequence[Result],
    table: Sequence[Row],
    exits: Sequence[Row],
    pictures: Mapping[str, Path],
    header: Mapping[str, Any],
    seeds: int,
    page: Path,
) -> str:
    """The page, in Markdown.

    Args:
        runs: all of the sweep, and ``done``, which of them have a result.
        waits: groups that have no runs yet.
        results: of the runs.
        table: what :func:`~ds_al.studies.sweep.table.rows` made of them, and ``exits``, :func:`.exits.exit_table`.
        pictures: by group.
        header: of the results file: date, command, machine, versions.
        seeds: number of seeds that the sweep asks for.
        page: where the page will lie, for links to pictures.
    """
    asked = [
        {"group": run.group, "method": run.method, "K": run.layers, "seed": run.seed, "done": there}
        for run, there in zip(runs, done, strict=True)
    ]
    blocks: list[Table | str] = [INTRODUCTION.format(seeds=seeds), "## What is missing", tables.missing(asked, waits)]
    for own in groups(table, "group"):
        group = own[0]["group"]
        blocks += [f"## {group}", tables.group(own, seeds=seeds), _origin(results, group)]
        if found := tables.exits(exits, group):
            blocks += [EXITS, *found]
        if group in pictures:
            link = os.path.relpath(pictures[group], page.parent)
            blocks.append(f"![{group}: accuracy over epochs, over time, by number of layers, by exit]({link})")
    blocks.append(
        f"{origin(header)} The config, versions and curve of every run are a line of `docs/results/<sweep>.runs.jsonl`."
    )
    return document(*blocks)


def _origin(results: Sequence[Result], group: str) -> str:
    """When and where a group was run; a page may be written elsewhere, and later."""
    own = [result for result in results if result["group"] == group and "failure" not in result]
    days = sorted({result["date"][:10] for result in own})
    machines = dict.fromkeys(f"{result['cores']} cores ({result['cpu']})" for result in own)
    return f"Runs of {' to '.join(dict.fromkeys((days[0], days[-1])))}, {'; '.join(machines)}."
