"""Draws a group of a sweep: accuracy over epochs, time, operations and K, at each exit and at early ones."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_al.figures import palette
from ds_al.figures.pictures import blank, finish, plain, save
from ds_al.studies.results import Row
from ds_al.studies.sweep.table import times_count, twins_of
from ds_al.studies.tables.write import groups

Axes = Any


_COLOURS = (palette.BLACK, *palette.SERIES)
"""Styles of a sweep's methods, whose names are free; the first one is the baseline."""


def draw_group(results: Sequence[Row], path: Path) -> list[Path]:
    """Draws one group of a sweep, up to six panels; lines are means over seeds, bands one standard deviation.

    Panels show what lies within some points of the best method, and name the methods that end below. Of runs that do
    not look at test samples, all panels show the accuracy on validation samples.

    Args:
        results: results of the group's runs; failed ones are omitted.
        path: path of the figure; its suffix is replaced.

    Returns:
        The files: PNG and SVG; empty if no run has a result, or none that all of them have, or the twin alone has runs.
    """
    from matplotlib.ticker import MaxNLocator

    done = [result for result in results if "failure" not in result]
    part = next((part for part in ("test", "validation") if all(r[f"{part}_accuracy"] for r in done)), None)
    if part is None or all(result["K"] is None for result in done):
        return []
    column = f"{part}_accuracy"
    figure, panels = blank(2, 4, size=(19, 8.2))
    epochs, seconds, operations, depth, exits, cost, key, spare = panels
    methods = list(dict.fromkeys(result["suite_method"] for result in done))
    depths = sorted({result["K"] for result in done if result["K"] is not None})
    several = len({result["P"] for result in done}) > 1
    ends: dict[str, float] = {}
    twins = twins_of(done)
    for own in groups(done, "suite_method", "K", "P"):
        method, layers = own[0]["suite_method"], own[0]["K"]
        dash = palette.DASHES[(0 if layers is None else depths.index(layers)) % len(palette.DASHES)]
        style = {**method_look(methods.index(method)), "linestyle": dash, "markersize": 4, "linewidth": 1.5}
        label = plain(method) if layers is None else f"{plain(method)}, K = {layers}"
        label += f", P = {own[0]['P']}" if several else ""
        ends[label] = _mean([result[column][-1] for result in own])[0]
        numbers, times, means, spreads = _curve(own)
        rho = 1.0 if layers is None else own[0].get("rho")  # the twin records the rho of its AL form
        counted = [] if rho is None else [(operations, [number * rho for number in numbers])]
        timed = [(seconds, times)] if times_count(own, twins) else []
        for axes, x in ((epochs, numbers), *timed, *counted):
            axes.plot(x, means, label=label, **style)
            low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
            axes.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)
        if layers is not None and len(own[0][column]) > 1:
            values = [100 * statistics.mean(same) for same in zip(*(r[column] for r in own), strict=True)]
            exits.plot(range(1, len(values) + 1), values, label=label, **style)
        _early_exit(cost, own, style)
    for number, method in enumerate(methods):
        _by_depth(depth, [result for result in done if result["suite_method"] == method], number, column)
    finish(epochs, "epoch", "validation accuracy, %", "over epochs")
    finish(seconds, "seconds of training", "validation accuracy, %", "over time")
    finish(operations, "operations, in epochs of the twin", "validation accuracy, %", "over operations")
    finish(depth, "K, number of AL layers", f"{part} accuracy, %", "by number of layers; line: back-propagation")
    finish(exits, "exit after layer", f"{part} accuracy, %", "at each exit")
    finish(cost, "operations per sample, % of the full path", "test accuracy, %", "each sample at its first sure exit")
    for axes in (epochs, seconds, operations):
        _focus(axes, ends, points=30, of=part)
    for axes in (depth, exits, cost):
        _focus(axes, ends, points=15, of=part)
    for axes in (epochs, exits):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    cost.set_visible(bool(cost.lines))  # not every sweep evaluates early exits
    depth.set_xticks(depths)
    key.legend(*epochs.get_legend_handles_labels(), loc="center", ncols=2, frameon=False, fontsize=11)
    for axes in (key, spare):
        axes.axis("off")
    return save(figure, path)


def _focus(axes: Axes, ends: Mapping[str, float], *, points: float, of: str) -> None:
    """Cuts the axis below the best method's accuracy less some points, and names those that end below."""
    least = max(ends.values()) - points
    if axes.get_ylim()[0] >= least:
        return
    axes.set_ylim(bottom=least)
    if below := [f"{label}: {accuracy:.1f}" for label, accuracy in ends.items() if accuracy < least]:
        text = "\n".join([f"below ({of} accuracy):", *below])
        axes.text(0.97, 0.03, text, transform=axes.transAxes, ha="right", va="bottom", fontsize=9)


def method_look(number: int) -> dict[str, Any]:
    """Returns colour and marker; when colours repeat, markers are open and differ from the first ones."""
    again, place = divmod(number, len(_COLOURS))
    colour = _COLOURS[place]
    return {
        "color": colour,
        "marker": palette.MARKERS[(place + again) % len(palette.MARKERS)],
        "markerfacecolor": "white" if again else colour,
    }


def _curve(own: Sequence[Row]) -> tuple[list[int], list[float], list[float], list[float]]:
    """Returns evaluated epochs, mean seconds until then, mean accuracy and its standard deviation, in percent."""
    looked = [[e for e in r["history"] if e.get("validation_accuracy")] for r in own]
    numbers = [epoch["epoch"] for epoch in looked[0]]
    times, means, spreads = [], [], []
    for place, number in enumerate(numbers):
        mean, spread = _mean([run[place]["validation_accuracy"][-1] for run in looked if place < len(run)])
        means.append(mean)
        spreads.append(spread)
        times.append(statistics.mean(sum(e["seconds"] for e in r["history"] if e["epoch"] <= number) for r in own))
    return numbers, times, means, spreads


def _early_exit(axes: Axes, own: Sequence[Row], style: Mapping[str, Any]) -> None:
    """Draws accuracy against cost, with one point per confidence threshold."""
    known = [result["early_exit"] for result in own if result.get("early_exit")]
    points = [
        [100 * statistics.mean(row[name] for row in same) for name in ("cost", "accuracy")]
        for same in zip(*known, strict=True)
    ]
    if points:
        axes.plot(*zip(*sorted(points), strict=True), **style)


def _by_depth(axes: Axes, own: Sequence[Row], number: int, column: str) -> None:
    look = method_look(number)
    depths = sorted({result["K"] for result in own if result["K"] is not None})
    if not depths:
        dash = "-" if number < len(_COLOURS) else "--"
        level = 100 * statistics.mean(result[column][-1] for result in own)
        axes.axhline(level, color=look["color"], linestyle=dash, linewidth=1.5)
        return
    found = [_mean([result[column][-1] for result in own if result["K"] == k]) for k in depths]
    means, spreads = zip(*found, strict=True)
    axes.errorbar(depths, means, yerr=spreads, **look, capsize=3, linewidth=1.5)


def _mean(shares: Sequence[float]) -> tuple[float, float]:
    """Returns mean and standard deviation in percent."""
    values = [100 * share for share in shares]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
