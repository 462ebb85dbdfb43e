"""Draws charts as PNG and SVG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds_al.figures import palette, pictures
from ds_al.figures.parts import Chart, Series

_DASHES: tuple[Any, ...] = ("-", ":", "-.", (0, (6, 2)), ":", "-.")
_MARKERS = ("o", "s", "D", "^", "P", "X")
_HATCHES = ("", "//", "xx", "..", "\\\\", "--")


def draw(
    charts: Sequence[Chart],
    path: Path,
    *,
    size: tuple[float, float] = (9, 4),
    columns: int = 1,
    shared: bool = False,
    suffixes: Sequence[str] = (".png",),
) -> list[Path]:
    """Draws one or several charts with a common legend.

    Args:
        charts: one chart per panel, row by row.
        path: path of the picture; its suffix is replaced by each of ``suffixes``.
        size: width and height of a panel, in inches.
        columns: panels per row.
        shared: whether all panels share the same scales, which start at 0.
        suffixes: file formats.

    Returns:
        The files.
    """
    columns = min(columns, len(charts))
    rows = -(-len(charts) // columns)
    several = 0.7 if len(charts) > 1 else 0.0  # for the legend
    figure, panels = pictures.blank(
        rows, columns, size=(size[0] * columns, size[1] * rows + several), sharex=shared, sharey=shared
    )
    for axes, chart in zip(panels, charts, strict=False):
        _chart(axes, chart)
    for axes in panels[len(charts) :]:
        axes.set_visible(False)
    if shared:
        values = [value for chart in charts for series in chart.series for value in series.y if value is not None]
        panels[0].set_ylim(0, 1.06 * max(values, default=0.0) or 1)
        panels[0].set_xlim(left=0)
        for axes in panels[:-columns]:
            axes.set_xlabel("")
    named = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if named:
        figure.legend(
            named.values(),
            named,
            loc="outside lower center",
            ncols=min(len(named), 4),
            frameon=False,
            fontsize=11 if len(charts) > 1 else 9,
        )
    return pictures.save(figure, path, suffixes=suffixes, dpi=130)


def look(style: int) -> tuple[str, int]:
    """Returns a colour and the index of a dash, marker or pattern, which changes whenever the colours repeat."""
    return palette.SERIES[style % len(palette.SERIES)], (style + style // len(palette.SERIES)) % len(palette.SERIES)


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
    if chart.log_x:
        ticks = sorted({float(x) for series in chart.series for x in series.x})
        axes.set_xscale("log", base=chart.base)
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    elif not bars and chart.x_label.startswith(("epoch", "exit")):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if chart.shows_log_y:
        axes.set_yscale("log", base=chart.base)
        if chart.base != 10:
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_title(pictures.plain(chart.title), loc="left", fontsize=12)
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    axes.grid(alpha=0.3, axis="y" if bars else "both")
    axes.spines[["top", "right"]].set_visible(False)


def _line(axes: Any, series: Series) -> None:
    colour, shape = look(series.style)
    dash, marker = _DASHES[shape], _MARKERS[shape]
    if series.method is not None:
        colour, dash, marker = palette.METHODS[series.method]
    thin, mark, steps = series.look == "thin", series.look == "mark", series.look == "steps"
    axes.errorbar(
        list(series.x),
        [float("nan") if value is None else value for value in series.y],
        yerr=_spread(series),
        color=colour,
        linestyle="none" if mark else "-" if thin else "--" if series.dashed else dash,
        marker="*" if mark else None if thin or steps else marker,
        fillstyle="none" if series.dashed else "full",
        markersize=13 if mark else 5,
        linewidth=0.8 if thin else 1.8,
        alpha=0.6 if thin else 1.0,
        capsize=3,
        drawstyle="steps-pre" if steps else "default",
        label=pictures.plain(series.name),
    )


def _bars(axes: Any, series: Series, *, offset: float, width: float) -> None:
    colour, shape = look(series.style)
    axes.bar(
        [number + offset for number in range(len(series.x))],
        [value or 0.0 for value in series.y],
        width=width,
        yerr=_spread(series),
        capsize=3,
        color=colour,
        edgecolor="white",
        hatch=_HATCHES[shape],
        label=pictures.plain(series.name),
    )


def _spread(series: Series) -> list[float] | None:
    return [value or 0.0 for value in series.spread] if series.spread and any(series.spread) else None
