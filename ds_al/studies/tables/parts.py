"""Declares the tables of studies that consist of parts (:mod:`ds_al.studies.parts`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ds_al.figures.parts import Table
from ds_al.studies.results import Row
from ds_al.studies.tables.write import Column, Template, listed


def parts(rows: Sequence[Row]) -> Table:
    """Returns one line per part: whether it was done, or why not."""
    return in_cells(
        rows,
        {
            "part": "{title}",
            "outcome": outcome,
            "seconds": "{seconds:.0f} of {limit:.0f}",
            "run": "{date}",
        },
    )


def outcome(row: Row) -> str:
    """Returns whether a part was done, with the number of failures that it reports, or why not."""
    failed = sum(each.get("outcome") == "failed" or bool(each.get("failure")) for each in row["rows"])
    return (f"done, {failed} failed" if failed else "done") if row["done"] else cell(row["reason"])


def tests(rows: Sequence[Row]) -> Table:
    """Returns one line per test."""
    columns: dict[str, Template] = {
        "test": "`{test}`",
        "outcome": "{outcome}",
        "seconds": "{seconds:.1f}",
        "why": lambda row: cell(row["reason"]),
    }
    return in_cells(rows, columns)


def cell(text: str) -> str:
    """Returns the first line of a text, as far as it fits into a cell."""
    line = next(iter(text.strip().splitlines()), "").replace("|", "\\|")
    return line if len(line) <= 200 else f"{line[:200]} ..."


def in_cells(rows: Sequence[Row], columns: Mapping[str, Template]) -> Table:
    """Returns a table of texts, with the columns by their titles."""
    return listed(rows, [Column(title, show, left=True) for title, show in columns.items()])
