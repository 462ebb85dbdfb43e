"""Declares the tables that show local learning beside back-propagation: each time as a multiple of 1F1B's and of the
best rival's in the same run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ds_al.figures.parts import Table
from ds_al.studies.bench.dial import RIVALS
from ds_al.studies.results import Row
from ds_al.studies.tables.write import Column, crossed, groups, listed

PIPELINE = (
    Column("K", "{layers}"),
    Column("method", "`{method}`", left=True),
    Column("schedule in a group", "{schedule}", left=True),
)

_OVER = (Column("x 1F1B", "{over_1f1b:.2f}"), Column("x best", "{over_rival:.2f}"))
DIAL = (
    Column("P", "{stages}"),
    Column("M", "{micro_batches}"),
    Column("K", "{layers}"),
    Column("method", lambda row: row["schedule"] or row["method"], left=True),
    Column("seconds", "{seconds:.3f}"),
    Column("efficiency", "{efficiency:.3f}"),
    *_OVER,
    Column("graphs", "{graphs_held:g}/{graphs_formula:g}"),
)
CORES = (
    Column("network", "{model}", left=True),
    Column("M", "{micro_batches}"),
    Column("K", "{layers}"),
    Column("method", lambda row: row["schedule"] or row["method"], left=True),
    Column("samples/s", "{samples_per_s:,.0f}"),
    Column("quartiles", "{samples_per_s_low:,.0f}..{samples_per_s_high:,.0f}"),
    *_OVER,
)


def dial(rows: Sequence[Row]) -> list[Table | str]:
    """Returns a table per number of stages: a line per K and schedule, and for each M the time, how many times as fast
    as 1F1B and as the best rival that is, and the graphs that a stage held."""
    cells = [
        Column("M = {micro_batches}: seconds (efficiency)", "{seconds:.3f} ({efficiency:.3f})"),
        Column("times 1F1B", "{over_1f1b:.2f}"),
        Column("times the best rival", "{over_rival:.2f}"),
        Column("graphs", "{graphs_held:g} of {graphs_formula:g}"),
    ]
    blocks: list[Table | str] = []
    for own in groups(_beside_rivals(rows), "stages"):
        best = {row["micro_batches"]: row["rival"] for row in own}
        blocks += [
            f"{own[0]['stages']} stages, {own[0]['batches']} batches; the best rival: {_named(best)}.",
            crossed(own, PIPELINE, cells, by="micro_batches"),
        ]
    return [*blocks, DIAL_NOTE]


DIAL_NOTE = """\
Efficiency: the time of the schedule by its formula over the time. Times 1F1B, times the best rival: how many times as
fast. Graphs: the most that a stage held, counted, of those by the formula."""


def dial_listed(rows: Sequence[Row]) -> list[Table | str]:
    """Returns one line per case, for the terminal."""
    return [
        listed(_beside_rivals(rows), DIAL, caption="sleeping: seconds of all batches of M micro-batches"),
        DIAL_NOTE,
    ]


def _beside_rivals(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows by stages and K, with ``over_1f1b``, ``over_rival`` and ``rival``."""
    found: list[Row] = []
    for own in groups(rows, "stages", "micro_batches"):
        rivals = {row["method"]: row["seconds"] for row in own if row["method"] in RIVALS}
        best = min(rivals, key=lambda method: rivals[method])
        found += [
            {
                **row,
                "over_1f1b": rivals[RIVALS[0]] / row["seconds"],
                "over_rival": rivals[best] / row["seconds"],
                "rival": best,
            }
            for row in own
        ]
    return sorted(found, key=lambda row: (row["stages"], row["layers"], row["method"] != "groups"))


def _named(best: Mapping[int, str]) -> str:
    return ", ".join(f"`{name}` at M = {m}" for m, name in sorted(best.items()))


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
        first = own[0]
        blocks += [
            f"`{first['model']}` on {first['stages']} stages, a core each, micro-batches of {first['micro_batch']}, "
            f"{first['repeats']} repetitions in turns; the best rival: {_named(best)}.",
            crossed(own, PIPELINE, cells, by="micro_batches"),
        ]
    return blocks


def cores_listed(rows: Sequence[Row]) -> list[Table | str]:
    """Returns one line per case, for the terminal."""
    return [listed(rows, CORES, caption="two cores; x: times as fast as 1F1B, and as the best rival")]
