"""Display of predictions as tables and figures, and parsing of link speeds."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table as RichTable

from ds_al.figures import charts, terminal
from ds_al.figures import markdown as text
from ds_al.figures.parts import Chart, Series, Table
from ds_al.planner.predict import BY_FORMULA, METHODS
from ds_al.planner.prediction import Prediction

_OVERVIEW = "K >= P: streaming; K < P: the best schedule inside groups; others: bp_*; (f) by formula, at the least"
_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "tbit": 1e12}


def bytes_per_second(speed: str) -> float:
    """Converts a speed such as ``"1gbit"`` or ``"100mbit"`` to bytes per second.

    Raises:
        ValueError: the text is not a number above 0 and a unit of bits per second.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit|tbit)", speed.strip().lower())
    if match is None or float(match[1]) == 0:
        raise ValueError(f"got {speed!r}: expected a speed such as 100mbit, 1gbit or 400gbit")
    return float(match[1]) * _UNITS[match[2]] / 8


def table(predictions: Sequence[Prediction]) -> RichTable:
    """Builds a table for the terminal with a row per prediction; the fastest for each P and M is marked."""
    rows, ends = [], []
    for own in cases(predictions):
        best = min(each.seconds for each in own)
        for each in own:
            name = each.name + (" (f)" if each.method in BY_FORMULA else "")
            rows.append(
                [
                    name + (" *" if each.seconds == best else ""),
                    str(each.stages),
                    str(each.micro_batches),
                    f"{each.seconds:.4g}",
                    f"{each.seconds / best:.2f}",
                    f"{each.bubble:.1%}",
                    f"{each.memory_bytes / 1e6:,.0f}",
                    f"{each.bytes_per_batch / 1e6:,.1f}",
                ]
            )
        ends.append(len(rows) - 1)
    columns = ("method", "P", "M", "seconds", "times the best", "bubble", "MB held", "MB sent")
    content = Table("* fastest; (f) by formula, at the least", columns, rows, frozenset(range(1, len(columns))))
    return terminal.table(content, title="per batch", sections=ends)


def overview(predictions: Sequence[Prediction]) -> RichTable:
    """Builds a table for the terminal with a row per P and M: the best time, and the multiple of it by method, and by K
    with the best schedule inside groups."""
    methods = sorted(dict.fromkeys(map(_column, predictions)), key=lambda name: not name.startswith("K"))
    rows, ends = [], []
    groups = cases(predictions)
    for number, own in enumerate(groups):
        best = min(each.seconds for each in own)
        slowest_first = sorted(own, key=lambda each: -each.seconds)
        multiples = {_column(each): f"{each.seconds / best:.2f}" for each in slowest_first}
        cells = (multiples.get(method, "-") for method in methods)
        rows.append([str(own[0].stages), str(own[0].micro_batches), f"{best:.4g}", *cells])
        if number + 1 == len(groups) or groups[number + 1][0].stages != own[0].stages:
            ends.append(number)
    # A heading has a line per word, so that the table fits 80 columns.
    heads = [_head(name) for name in methods]
    columns = ("P", "M", "seconds", *heads)
    content = Table(_OVERVIEW, columns, rows, frozenset(range(len(columns))))
    return terminal.table(content, title="per batch, and times the best", sections=ends)


def _head(name: str) -> str:
    short = "K >=\nP" if name == "streaming" else name.removeprefix("bp_").replace("_", "\n")
    return short + ("\n(f)" if name in BY_FORMULA else "")


def _column(each: Prediction) -> str:
    return f"K = {each.layers}" if each.schedule else each.method


def markdown(predictions: Sequence[Prediction]) -> str:
    """Builds the same table in Markdown; the fastest for each P and M is bold."""
    columns = (
        *("P", "M", "method", "ms per batch", "times the best"),
        *("bubble (least to most)", "MB held", "MB sent"),
    )
    rows = []
    for own in cases(predictions):
        best = min(each.seconds for each in own)
        for each in own:
            name = (each.name if each.schedule else f"`{each.name}`") + (" (f)" if each.method in BY_FORMULA else "")
            rows.append(
                [
                    str(each.stages),
                    str(each.micro_batches),
                    f"**{name}**" if each.seconds == best else name,
                    f"{1000 * each.seconds:.4g}",
                    f"{each.seconds / best:.2f}",
                    f"{each.bubble:.1%} ({each.bubble_least:.1%} to {each.bubble_most:.1%})",
                    f"{each.memory_bytes / 1e6:,.0f}",
                    f"{each.bytes_per_batch / 1e6:,.1f}",
                ]
            )
    return "\n".join(text.table(columns, rows, numeric={0, 1, 3, 4, 5, 6, 7})) + "\n"


def cases(predictions: Sequence[Prediction]) -> list[list[Prediction]]:
    """Groups predictions by P and M."""
    keys = dict.fromkeys((each.stages, each.micro_batches) for each in predictions)
    return [[each for each in predictions if (each.stages, each.micro_batches) == key] for key in keys]


def draw(predictions: Sequence[Prediction], path: Path) -> list[Path]:
    """Draws the time per batch over M, as a multiple of the fastest method's, with one panel per number of stages.

    Returns:
        The paths of the PNG and SVG files.
    """
    counts = sorted({each.stages for each in predictions})
    panels = [_panel([each for each in predictions if each.stages == p], title=f"P = {p}") for p in counts]
    return charts.draw(panels, path, size=(5.5, 3.4), columns=2, suffixes=(".png", ".svg"))


def _panel(predictions: Sequence[Prediction], *, title: str) -> Chart:
    numbers = sorted({each.micro_batches for each in predictions})
    best = {m: min(each.seconds for each in predictions if each.micro_batches == m) for m in numbers}
    columns = dict.fromkeys(map(_column, predictions))
    series = []
    for style, name in enumerate([*METHODS, *(column for column in columns if column not in METHODS)]):
        times: dict[int, float] = {}
        for each in predictions:
            if _column(each) == name:
                times[each.micro_batches] = min(each.seconds, times.get(each.micro_batches, math.inf))
        if times:
            run = [m for m in numbers if m in times]  # a method may need more micro-batches than the least
            method = name if name in METHODS else None  # a number of layers has a style of its own
            series.append(Series(name, x=run, y=[times[m] / best[m] for m in run], style=style, method=method))
    return Chart(
        title,
        x_label="M, micro-batches per batch",
        y_label="time, times the fastest",
        series=series,
        log_x=True,
        log_y=True,
        base=2,
    )
