"""Draws the frontier: accuracy over time per sample and memory per stage, a curve over K and the rivals as points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ds_al.figures import palette
from ds_al.figures.pictures import bare, blank, legend, plain, save
from ds_al.studies.results import Row
from ds_al.studies.tables.write import groups

Axes = Any
Place = Callable[[Row], float]
_TITLES = {"measured": "time per sample, measured, stages that sleep", "planner": "time per sample, planner"}
_TIME = "times an ideal back-propagation pipeline"
_LEVELS = 3  # distances of the names of rivals, one above or below the other


def draw_frontier(rows: Sequence[Row], path: Path, *, title: str) -> list[Path]:
    """Draws a panel of time for each basis and number of micro-batches, and one of memory.

    Args:
        rows: rows of :func:`~ds_al.studies.frontier.points.frontier`.
        path: path of the figure; its suffix is replaced.
        title: network and data.

    Returns:
        The files: PNG and SVG.
    """
    cases = sorted(groups(rows, "micro_batches", "basis"), key=lambda own: (own[0]["micro_batches"], own[0]["basis"]))
    figure, (*times, memory) = blank(1, len(cases) + 1, size=(4.9 * (len(cases) + 1), 4.9), sharey=True)
    for axes, own in zip(times, cases, strict=True):
        _points(axes, own, lambda row: row["time"])
        _finish(axes, own[0], _TITLES[own[0]["basis"]], _TIME)
        axes.axvline(1.0, color=palette.LIGHT_GREY, linewidth=3, zorder=0)
    counted = next(own for own in cases if own[0]["basis"] == "planner")
    _points(memory, counted, lambda row: row["memory_bytes"] / 1e6)
    _finish(memory, counted[0], "memory of the fullest stage, planner", "MB")
    times[0].set_ylabel("test accuracy, %", fontsize=11)
    figure.suptitle(plain(title), fontsize=13, x=0.01, ha="left")
    legend(figure, times[0], "outside lower center", columns=2, size=11)
    return save(figure, path)


def _finish(axes: Axes, first: Row, title: str, label: str) -> None:
    axes.set_title(f"{title}\nP = {first['stages']}, M = {first['micro_batches']}", loc="left", fontsize=11)
    axes.set_xlabel(label, fontsize=11)
    bare(axes)
    axes.margins(0.15, 0.36)


def _points(axes: Axes, rows: Sequence[Row], place: Place) -> None:
    """Draws the curve over K, its mean of all exits, and the rivals."""
    from matplotlib.patheffects import withStroke

    look = palette.METHODS["streaming"]
    local = sorted((row for row in rows if row["kind"] == "al"), key=lambda row: row["layers"])
    x, y = [place(row) for row in local], [100 * row["accuracy"] for row in local]
    spread = [100 * (row["accuracy_sd"] or 0.0) for row in local]
    axes.errorbar(
        x, y, yerr=spread, color=look.colour, linewidth=2.4, marker=look.marker, markersize=9, capsize=3,
        label="K local layers on P stages, last exit; bars: standard deviation over seeds",
    )  # fmt: skip
    if all(row["averaged"] is not None for row in local):
        axes.plot(
            x, [100 * row["averaged"] for row in local], color=palette.SKY, linestyle="--", marker="s", markersize=4,
            label="mean of all exits",
        )  # fmt: skip
    for row, *at in zip(local, x, y, strict=True):
        side, align = (10, "left") if at[0] == max(x) else (-10, "right")
        axes.annotate(
            f"K = {row['layers']}", at, xytext=(side, -5), textcoords="offset points", ha=align, color=look.colour,
            fontsize=11, zorder=5, path_effects=[withStroke(linewidth=4, foreground="white")],
        )  # fmt: skip
    rivals = sorted((row for row in rows if row["kind"] == "rival"), key=place)
    for number, row in enumerate(rivals):
        style, at = palette.METHODS[row["method"]], [place(row), 100 * row["accuracy"]]
        away = 1 if 2 * sum(each >= at[1] for each in y) < len(y) else -1  # where fewer of the K points are
        axes.plot(*at, color=style.colour, marker=style.marker, markersize=9, linestyle="")
        axes.annotate(
            row["method"], at, xytext=(0, away * (18 + 13 * (number % _LEVELS))), textcoords="offset points",
            ha="center", va="center", color=style.colour, fontsize=9,
            path_effects=[withStroke(linewidth=3, foreground="white")],
            arrowprops={"arrowstyle": "-", "color": style.colour, "alpha": 0.4},
        )  # fmt: skip
