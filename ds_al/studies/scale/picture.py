"""Draws predictions for many stages: links, many micro-batches, stragglers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds_al.figures import palette
from ds_al.figures.pictures import blank, doubling, finish, legend, save, style
from ds_al.studies.results import Row
from ds_al.studies.scale.predictions import LARGE, LINKS, OVERLAPPED
from ds_al.studies.scale.views import FORMULA, row_of, rows_of, series, share_of_alone

_SCALE = {
    **palette.METHODS,
    OVERLAPPED: palette.Look(palette.VERMILION, ":", "v"),
    "streaming, one step per batch": palette.Look(palette.BLUE, ":", "s"),
    "bound (M + P - 1) / (M rho)": palette.Look(palette.GREY, "-", ""),
}


def draw_scale(rows: Sequence[Row], folder: Path) -> dict[str, list[Path]]:
    """Draws ``scale-links``, ``scale-sweep`` and ``scale-stragglers``, each as PNG and SVG, by name."""
    drawn = {"links": _links(rows), "sweep": _many_micro_batches(rows), "stragglers": _stragglers(rows)}
    return {name: save(figure, folder / f"scale-{name}.png") for name, figure in drawn.items()}


def _links(rows: Sequence[Row]) -> Any:
    own = rows_of(rows, section="links", workload=LARGE.name)
    least = own[0]["micro_batches"]
    counts = list(dict.fromkeys(row["stages"] for row in own))
    figure, panels = blank(1, len(counts), size=(4.6 * len(counts), 4.2), sharey=True)
    for axes, stages in zip(panels, counts, strict=True):
        case = rows_of(own, stages=stages, micro_batches=least)
        for method in dict.fromkeys(row["method"] for row in case):
            values = [row_of(case, method=method, link=link)["times_compute"] for link in LINKS]
            label = f"{method} (formula)" if method in FORMULA else method
            axes.plot(list(LINKS), values, markersize=5, label=label, **style(_SCALE[method]))
        axes.set_yscale("log")
        finish(
            axes, "link", "time, times the twin's compute" if axes is panels[0] else "", f"P = {stages}, M = {least}"
        )
    legend(figure, panels[0], "outside lower center", columns=4)
    return figure


def _many_micro_batches(rows: Sequence[Row]) -> Any:
    curves = series(rows)
    figure, (axes,) = blank(1, 1, size=(7.5, 5.2))
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), markersize=5, label=name, **style(_SCALE[name]))
    axes.axhline(1.0, color="black", linewidth=0.8)
    doubling(axes, [m for m, _ in next(iter(curves.values()))])
    stages = rows_of(rows, section="sweep")[0]["stages"]
    finish(axes, "M, micro-batches per batch", "times as fast as 1F1B", f"P = {stages}")
    legend(figure, axes, "outside lower center", columns=2)
    return figure


def _stragglers(rows: Sequence[Row]) -> Any:
    own = rows_of(rows, section="stragglers", method="streaming")
    counts = list(dict.fromkeys(row["stages"] for row in own))
    jitters = list(dict.fromkeys(row["jitter"] for row in own))
    figure, panels = blank(1, len(counts), size=(4.6 * len(counts), 4.2), sharey=True)
    for axes, stages in zip(panels, counts, strict=True):
        for number, jitter in enumerate(jitters):
            case = rows_of(own, stages=stages, jitter=jitter)
            shares, spreads = zip(*(share_of_alone(row) for row in case), strict=True)
            depths = [row["queue_depth"] for row in case]
            look = palette.Look(
                *(each[number % len(each)] for each in (palette.SERIES, palette.DASHES, palette.MARKERS))
            )
            axes.errorbar(depths, shares, yerr=spreads, markersize=5, capsize=2, label=jitter, **style(look))
        doubling(axes, sorted({row["queue_depth"] for row in own}))
        label = "throughput, of a stage alone" if axes is panels[0] else ""
        finish(axes, "queue depth, messages", label, f"streaming, P = {stages}")
    legend(figure, panels[0], "outside lower center", columns=4)
    return figure
