"""Declares the tables of what a death costs."""

from __future__ import annotations

from collections.abc import Sequence

from ds_al.figures.parts import Table
from ds_al.studies.bench.recovery import PARTS, RUNNING
from ds_al.studies.results import Row
from ds_al.studies.tables.write import Column, listed, number

_TITLES = ("noticed", "process", "load", "borders", "train again")
DEATHS = (
    Column("what starts again", "{form}", left=True),
    Column("deaths", "{deaths}"),
    Column("seconds (quartiles)", "{seconds:.2f} ({seconds_low:.2f} to {seconds_high:.2f})"),
    *(Column(title, number(part, ".2f")) for title, part in zip(_TITLES, PARTS, strict=True)),
    Column("micro-batches trained again", "{recomputed:.0f}"),
    Column("MiB sent again", number("replayed_bytes", ".2f", times=1 / 2**20)),
)
COST = (
    Column("job", "{form}", left=True),
    Column("ms per micro-batch", "{per_micro_batch*1000:.2f}"),
    Column("times as long", "{ratio:.3f}"),
)


def recovery(rows: Sequence[Row]) -> list[Table | str]:
    """Returns a table of the deaths, and one of running with recovery while nobody dies."""
    on, off = RUNNING
    seconds = {row["form"]: row["per_micro_batch"] for row in rows}
    return [
        listed([row for row in rows if row["deaths"]], DEATHS, caption="from a death to the stage's next micro-batch"),
        "Seconds are medians. noticed: until its keeper knows, or the launcher has ended all; process: until the "
        "engine is complete; load: the state; borders: new process groups; train again: up to the micro-batch at which "
        "it died.",
        listed(
            [{**row, "ratio": seconds[row["form"]] / seconds[off]} for row in rows if row["form"] in (on, off)],
            COST,
            caption="while nobody dies",
        ),
    ]
