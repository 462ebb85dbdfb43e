"""The scaling measurements as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

Row = Mapping[str, Any]


def scaling_table(rows: Sequence[Row]) -> Table:
    """A line per case."""
    table = _table("scaling; seconds of all batches", "study", "method")
    for column in ("P", "seconds", "busy", "ideal", "computed", "efficiency", "speed-up"):
        table.add_column(column, justify="right", no_wrap=True)
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        mark = "*" if row["basis"] == "computed" else ""
        table.add_row(
            row["study"],
            row["method"],
            str(row["stages"]),
            *(f"{row[column]:.2f}" for column in ("seconds", "busy_seconds", "ideal", "attainable_seconds")),
            f"{row['efficiency']:.3f}{mark}",
            "-" if row["speedup"] is None else f"{row['speedup']:.2f}{mark}",
            end_section=after is not None and (row["study"], row["stages"]) != (after["study"], after["stages"]),
        )
    table.caption = "busy: the slowest stage; computed: the schedule with busy times; * by that"
    table.caption_justify = "left"
    return table


def ceiling_table(rows: Sequence[Row]) -> Table:
    """A line per network and method."""
    table = _table("samples per second on two stages, share of the ceiling", "network", "method")
    for column in ("samples/s", "quartiles", "share", "quartiles", "balance"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["model"],
            row["method"],
            f"{row['samples_per_s']:.1f}",
            f"{row['samples_per_s_low']:.1f}..{row['samples_per_s_high']:.1f}",
            f"{row['share_of_ceiling']:.3f}",
            f"{row['share_low']:.3f}..{row['share_high']:.3f}",
            f"{row['balance']:.3f}",
        )
    return table


def ratio_table(rows: Sequence[Row]) -> Table:
    """A line per network and M."""
    table = _table("streaming over 1F1B, two stages; bound (M + P - 1) / (M rho)", "network")
    for column in ("M", "ratio", "quartiles", "rho", "bound", "share", "bound*", "share", "wins"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["model"],
            str(row["micro_batches"]),
            f"{row['ratio']:.3f}",
            f"{row['ratio_low']:.3f}..{row['ratio_high']:.3f}",
            f"{row['rho']:.3f}",
            f"{row['bound']:.3f}",
            f"{row['share_of_bound']:.3f}",
            f"{row['bound_balanced']:.3f}",
            f"{row['share_of_balanced']:.3f}",
            "AL" if row["wins"] else "1F1B",
        )
    table.caption = "* with the stages as they are, not equal"
    table.caption_justify = "left"
    return table


def _table(title: str, *names: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in names:
        table.add_column(name, no_wrap=True)
    return table
