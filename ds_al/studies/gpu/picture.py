"""Draws validation accuracy by epoch of the trainings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ds_al.figures.charts import draw
from ds_al.figures.parts import Chart, Series
from ds_al.studies.results import Row
from ds_al.studies.tables.write import groups


def draw_accuracy(rows: Sequence[Row], path: Path) -> list[Path]:
    """Draws a panel per network, with a line per form.

    Args:
        rows: rows of the part ``accuracy``; those that failed are left out.
        path: path of the picture, a PNG.

    Returns:
        The file, or none where no run succeeded.
    """
    own = [row for row in rows if not row["failure"]]
    charts = [
        Chart(
            same[0]["network"], "epoch", "validation accuracy, %", [_line(row, style) for style, row in enumerate(same)]
        )
        for same in groups(own, "network")
    ]
    return draw(charts, path, size=(6, 4), columns=2) if charts else []


def _line(row: Row, style: int) -> Series:
    accuracy = row["validation_accuracy"]
    name = "twin" if row["K"] is None else f"AL, K = {row['K']}"
    return Series(name, range(1, len(accuracy) + 1), [100 * share for share in accuracy], style)
