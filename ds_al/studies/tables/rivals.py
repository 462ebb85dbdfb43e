"""Declares the tables that show local learning beside back-propagation: each time as a multiple of 1F1B's and of the
best rival's in the same run."""

from __future__ import annotations

from collections.abc import Sequence

from ds_al.figures.parts import Table
from ds_al.studies.bench.dial import RIVALS
from ds_al.studies.results import Row
from ds_al.studies.tables.write import Column, crossed, groups

_PIPELINE = (
    Column("K", "{layers}"),
    Column("method", "`{method}`", left=True),
    Column("schedule in a group", "{schedule}", left=True),
)


def dial(rows: Sequence[Row]) -> list[Table | str]:
    """Returns a table per number of stages: a line per K and schedule, and for each M the time, how many times as fast as
    1F1B and as the best rival that is, and the graphs that a stage held."""
    blocks: list[Table | str] = []
    for stages in groups(sorted(rows, key=lambda row: row["stages"]), "stages"):
        shown, best = [], []
        for own in groups(stages, "micro_batches"):
            rivals = [row for row in own if row["method"] in RIVALS]
            first, rival = rivals[0], min(rivals, key=lambda row: row["seconds"])
            best.append(f"`{rival['method']}` at M = {rival['micro_batches']}")
            shown += [
                {**row, "over_1f1b": first["seconds"] / row["seconds"], "over_rival": rival["seconds"] / row["seconds"]}
                for row in own
            ]
        cells = [
            Column("M = {micro_batches}: seconds (efficiency)", "{seconds:.3f} ({efficiency:.3f})"),
            Column("times 1F1B", "{over_1f1b:.2f}"),
            Column("times the best rival", "{over_rival:.2f}"),
            Column("graphs", "{graphs_held:g} of {graphs_formula:g}"),
        ]
        blocks += [
            crossed(
                sorted(shown, key=lambda row: (row["layers"], row["method"] != "groups")),
                _PIPELINE,
                cells,
                by="micro_batches",
                caption=f"P = {stages[0]['stages']} stages, sleeping, {stages[0]['batches']} batches",
            ),
            f"The best rival on {stages[0]['stages']} stages: {', '.join(best)}.",
        ]
    return [
        *blocks,
        "Efficiency: the time of the schedule by its formula over the time. Times 1F1B, times the best rival: how many "
        "times as fast. Graphs: the most that a stage held, counted, of those by the formula.",
    ]


def cores(rows: Sequence[Row]) -> list[Table | str]:
    """Returns a table per network: a line per pipeline, and for each M samples per second with quartiles, as a multiple
    of 1F1B and of the best rival."""
    cells = [
        Column(
            "M = {micro_batches}: samples/s (quartiles)",
            "{samples_per_s:,.0f} ({samples_per_s_low:,.0f} to {samples_per_s_high:,.0f})",
        ),
        Column("times 1F1B", "{over_1f1b:.2f}"),
        Column("times the best rival", "{over_rival:.2f}"),
    ]
    blocks: list[Table | str] = []
    for own in groups(rows, "model"):
        best = {row["micro_batches"]: row["rival"] for row in own}
        names = ", ".join(f"`{name}` at M = {m}" for m, name in sorted(best.items()))
        first = own[0]
        blocks += [
            f"`{first['model']}` on {first['stages']} stages, a core each, micro-batches of {first['micro_batch']}, "
            f"{first['repeats']} repetitions in turns; the best rival: {names}.",
            crossed(own, _PIPELINE, cells, by="micro_batches"),
        ]
    return blocks
