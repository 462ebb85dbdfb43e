"""Declares the table of the frontier: accuracy, time and memory of every K and every rival."""

from __future__ import annotations

from collections.abc import Sequence

from ds_al.figures.parts import Table
from ds_al.studies.results import Row
from ds_al.studies.tables.write import Column, groups, listed, number

_COLUMNS = (
    Column("K", number("layers", "d")),
    Column("method", lambda row: row["schedule"] or f"`{row['method']}`", left=True),
    Column("test accuracy, %", number("accuracy", ".2f", times=100)),
    Column("mean of all exits", number("averaged", ".2f", times=100)),
    Column("time", number("time", ".2f")),
    Column("MB per stage", number("memory_bytes", ".1f", times=1e-6)),
)


def frontier(rows: Sequence[Row]) -> list[Table | str]:
    """Returns a table for each basis and number of micro-batches."""
    blocks: list[Table | str] = []
    for own in groups(rows, "basis", "micro_batches"):
        first = own[0]
        how = "stages that sleep, measured" if first["basis"] == "measured" else "planner"
        blocks += [f"P = {first['stages']}, M = {first['micro_batches']}, {how}:", listed(own, _COLUMNS)]
    return blocks
