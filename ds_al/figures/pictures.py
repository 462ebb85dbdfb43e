"""Draws charts and timelines as PNG files, for a text in a repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ds_al.figures import palette
from ds_al.figures.charts import GREY, KIND_COLOURS, look, wide
from ds_al.figures.parts import Chart, Series, Timeline
from ds_al.report.timelines import BUSY, KINDS

_DASHES: tuple[Any, ...] = ("-", ":", "-.", (0, (6, 2)), ":", "-.")
_MARKERS = ("o", "s", "D", "^", "P", "X")
_HATCHES = ("", "//", "xx", "..", "\\\\", "--")
_KIND_HATCHES = {"receive": "///", "send": "\\\\\\", "load data": "...", "barrier": "xxx", "evaluation": "---"}


def draw(chart: Chart | Timeline, path: Path) -> Path:
    """Writes a chart as a PNG file, on white."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no global state
    from matplotlib.figure import Figure

    height = 1.3 + 0.55 * chart.stages if isinstance(chart, Timeline) else 4.0
    figure = Figure(figsize=(9, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    if isinstance(chart, Timeline):
        _timeline(axes, chart)
    else:
        _chart(axes, chart)
    axes.set_title(_text(chart.title), loc="left", fontsize=12)
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        figure.legend(loc="outside lower center", ncols=min(len(handles), 4), frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, facecolor="white")
    return path


def _chart(axes: Any, chart: Chart) -> None:
    from matplotlib.ticker import MaxNLocator

    bars = [series for series in chart.series if series.look == "bar"]
    for number, series in enumerate(bars):
        _bars(axes, series, offset=(number - (len(bars) - 1) / 2) * 0.8 / len(bars), width=0.8 / len(bars))
    if bars:
        longest = max(bars, key=lambda series: len(series.x))
        axes.set_xticks(range(len(longest.x)), [str(name) for name in longest.x])
    for series in chart.series:
        if series.look != "bar":
            _line(axes, series)
    if not bars and chart.x_label.startswith(("epoch", "exit")):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if chart.log_y and wide(chart):
        axes.set_yscale("log")
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    axes.grid(alpha=0.3, axis="y" if bars else "both")
    axes.spines[["top", "right"]].set_visible(False)


def _line(axes: Any, series: Series) -> None:
    colour, shape = look(series.style)
    y = [float("nan") if value is None else value for value in series.y]
    thin, mark, steps = series.look == "thin", series.look == "mark", series.look == "steps"
    axes.errorbar(
        list(series.x),
        y,
        yerr=[value or 0.0 for value in series.spread] if series.spread and any(series.spread) else None,
        color=colour,
        linestyle="none" if mark else "-" if thin else "--" if series.dashed else _DASHES[shape],
        marker="*" if mark else None if thin or steps else _MARKERS[shape],
        fillstyle="none" if series.dashed else "full",
        markersize=13 if mark else 5,
        linewidth=0.8 if thin else 1.8,
        alpha=0.6 if thin else 1.0,
        capsize=3,
        drawstyle="steps-post" if steps else "default",
        label=_text(series.name),
    )


def _bars(axes: Any, series: Series, *, offset: float, width: float) -> None:
    colour, shape = look(series.style)
    axes.bar(
        [number + offset for number in range(len(series.x))],
        [value or 0.0 for value in series.y],
        width=width,
        yerr=[value or 0.0 for value in series.spread] if series.spread and any(series.spread) else None,
        capsize=3,
        color=colour,
        edgecolor="white",
        hatch=_HATCHES[shape],
        label=_text(series.name),
    )


def _timeline(axes: Any, chart: Timeline) -> None:
    for kind in KINDS:
        own = [piece for piece in chart.slices if piece.kind == kind and not piece.nested and piece.start < chart.zoom]
        colour = palette.STEP if kind == "step" else KIND_COLOURS.get(kind, GREY)
        for stage in range(chart.stages):
            pieces = [(piece.start, piece.end - piece.start) for piece in own if piece.stage == stage]
            axes.broken_barh(
                pieces,
                (stage - 0.4, 0.8),
                facecolor=colour if kind in BUSY else "white",
                edgecolor=colour if kind == "step" or kind not in BUSY else "white",
                linewidth=1.0 if kind == "step" else 0.4,
                hatch=None if kind in BUSY else _KIND_HATCHES.get(kind, "||"),
                label=kind if own and stage == 0 else None,
            )
    axes.set_xlim(0, chart.zoom)
    axes.set_ylim(chart.stages - 0.5, -0.5)
    axes.set_yticks(range(chart.stages), [f"stage {stage}" for stage in range(chart.stages)])
    axes.set_xlabel("seconds")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _text(text: str) -> str:
    """A dollar sign would start a formula."""
    return text.replace("$", r"\$")
