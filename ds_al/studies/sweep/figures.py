"""Pictures of a suite's groups: validation accuracy over epochs and time, accuracy by K and by exit, early exit."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_al.figures import palette

Result = Mapping[str, Any]

# A suite's methods have names of their own; the first is its baseline.
_COLOURS = (palette.BLACK, *palette.SERIES)


def draw_group(results: Sequence[Result], path: Path) -> list[Path]:
    """Draws one group of a suite, up to five panels; lines are means over seeds, bands one standard deviation.

    Args:
        results: of the group's cells; failed ones are left out.
        path: where the picture goes; its suffix is replaced.

    Returns:
        The files: PNG and SVG; none where no cell has a result.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no global state
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    done = [result for result in results if "failure" not in result]
    if not done:
        return []
    figure = Figure(figsize=(15, 8.2), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    epochs, seconds, depth, exits, cost, key = figure.subplots(2, 3).flat
    methods = list(dict.fromkeys(result["suite_method"] for result in done))
    curves = list(dict.fromkeys((result["suite_method"], result["K"], result["P"]) for result in done))
    for method, layers, stages in curves:
        cell = [r for r in done if (r["suite_method"], r["K"], r["P"]) == (method, layers, stages)]
        style = _style(methods.index(method), sorted({k for _, k, _ in curves if k is not None}), layers)
        label = method if layers is None else f"{method}, K = {layers}"
        label += f", P = {stages}" if len({p for _, _, p in curves}) > 1 else ""
        numbers, times, means, spreads = _curve(cell)
        for axes, x in ((epochs, numbers), (seconds, times)):
            axes.plot(x, means, label=label, **style)
            low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
            axes.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)
        if layers is not None and len(cell[0]["test_accuracy"]) > 1:
            values = [100 * statistics.mean(column) for column in zip(*(r["test_accuracy"] for r in cell), strict=True)]
            exits.plot(range(1, len(values) + 1), values, label=label, **style)
        _early_exit(cost, cell, style)
    for number, method in enumerate(methods):
        _by_depth(depth, [r for r in done if r["suite_method"] == method], number)
    _finish(epochs, "epoch", "validation accuracy, %", "over epochs")
    _finish(seconds, "seconds of training", "validation accuracy, %", "over time")
    _finish(depth, "K, number of AL layers", "test accuracy, %", "by number of layers; line: back-propagation")
    _finish(exits, "exit after layer", "test accuracy, %", "at each exit")
    _finish(cost, "operations per sample, % of the full path", "test accuracy, %", "each sample at its first sure exit")
    for axes in (epochs, exits):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    cost.set_visible(bool(cost.lines))  # not every suite looks at it
    depth.set_xticks(sorted({k for _, k, _ in curves if k is not None}))
    handles, labels = epochs.get_legend_handles_labels()
    key.legend(handles, labels, loc="center", ncols=2, frameon=False, fontsize=11)
    key.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    for file in files:
        figure.savefig(file, dpi=130, facecolor="white")
    return files


def _style(method: int, depths: Sequence[int], layers: int | None) -> dict[str, Any]:
    place = 0 if layers is None else depths.index(layers)
    dash = palette.DASHES[place % len(palette.DASHES)]
    return {**_look(method), "linestyle": dash, "markersize": 4, "linewidth": 1.5}


def _look(method: int) -> dict[str, Any]:
    """Colour and marker; where the colours begin again markers are open, and each colour's is another one."""
    again, place = divmod(method, len(_COLOURS))
    colour = _COLOURS[place]
    return {
        "color": colour,
        "marker": palette.MARKERS[(place + again) % len(palette.MARKERS)],
        "markerfacecolor": "white" if again else colour,
    }


def _curve(cell: Sequence[Result]) -> tuple[list[int], list[float], list[float], list[float]]:
    """Epochs looked at, mean seconds until then, mean accuracy and its deviation, in percent."""
    looked = [[e for e in r["history"] if e.get("validation_accuracy")] for r in cell]
    numbers = [epoch["epoch"] for epoch in looked[0]]
    times, means, spreads = [], [], []
    for place, number in enumerate(numbers):
        values = [100 * run[place]["validation_accuracy"][-1] for run in looked if place < len(run)]
        means.append(statistics.mean(values))
        spreads.append(statistics.stdev(values) if len(values) > 1 else 0.0)
        times.append(statistics.mean(sum(e["seconds"] for e in r["history"] if e["epoch"] <= number) for r in cell))
    return numbers, times, means, spreads


def _early_exit(axes: Any, cell: Sequence[Result], style: Mapping[str, Any]) -> None:
    """Accuracy against cost, a point per threshold of confidence."""
    known = [r["early_exit"] for r in cell if r.get("early_exit")]
    points = [
        [100 * statistics.mean(row[key] for row in same) for key in ("cost", "accuracy")]
        for same in zip(*known, strict=True)
    ]
    if points:
        axes.plot(*zip(*sorted(points), strict=True), **style)


def _by_depth(axes: Any, own: Sequence[Result], number: int) -> None:
    look = _look(number)
    depths = sorted({r["K"] for r in own if r["K"] is not None})
    if not depths:
        dash = "-" if number < len(_COLOURS) else "--"
        level = 100 * statistics.mean(r["test_accuracy"][-1] for r in own)
        axes.axhline(level, color=look["color"], linestyle=dash, linewidth=1.5)
        return
    values = [[100 * r["test_accuracy"][-1] for r in own if r["K"] == k] for k in depths]
    axes.errorbar(
        depths,
        [statistics.mean(v) for v in values],
        yerr=[statistics.stdev(v) if len(v) > 1 else 0.0 for v in values],
        **look,
        capsize=3,
        linewidth=1.5,
    )


def _finish(axes: Any, x: str, y: str, title: str) -> None:
    axes.set_xlabel(x, fontsize=11)
    axes.set_ylabel(y, fontsize=11)
    axes.set_title(title, loc="left", fontsize=12)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
