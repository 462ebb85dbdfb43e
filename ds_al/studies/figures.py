"""Draws the figures of all studies with matplotlib, in the styles of :mod:`ds_al.figures.palette`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from ds_al.figures import palette
from ds_al.studies.bench import published
from ds_al.studies.results import Results, Row
from ds_al.studies.scale.predictions import LARGE, LINKS, OVERLAPPED
from ds_al.studies.scale.views import FORMULA, row_of, rows_of, series, share_of_alone
from ds_al.studies.sweep.table import times_count, twins_of
from ds_al.studies.tables.language import TITLES, TWIN
from ds_al.studies.tables.write import groups

Axes = Any

# ---- scaling, and streaming over 1F1B --------------------------------------------------------------------

_PUBLISHED = {"AL": ("#444444", "-", "*"), "BP": ("#444444", "--", "x")}
_STUDIES = {
    "weak": ("weak: k layers on k stages", "parallel_efficiency", "speed-up over stages"),
    "strong": ("strong: {layers} layers", "speedup", "speed-up over one stage"),
}
_RATIOS = {
    "ratio": ("measured", palette.METHODS["streaming"]),
    "bound": ("bound, equal stages", palette.Look(palette.VERMILION, "--", "^")),
    "bound_balanced": ("bound, stages as they are", palette.Look(palette.GREEN, ":", "s")),
}


def draw_scaling(rows: Sequence[Row], path: Path) -> list[Path]:
    """Draws parallel efficiency in the weak study and speed-up in the strong one, over stages.

    Args:
        rows: rows of one workload; computed points, as opposed to measured ones, are hollow.
        path: path of the figure; its suffix is replaced.

    Returns:
        The files: PNG and SVG; empty if no row has a speed-up.
    """
    known = [row for row in rows if row["speedup"] is not None]
    studies = [study for study in _STUDIES if any(row["study"] == study for row in known)]
    if not studies:
        return []
    figure, panels = _panels(len(studies), size=(6.2 * len(studies), 5.2))
    for axes, study in zip(panels, studies, strict=True):
        own = [row for row in known if row["study"] == study]
        title, column, label = _STUDIES[study]
        for method, look in palette.METHODS.items():
            points = sorted((r["stages"], r[column], r["basis"]) for r in own if r["method"] == method)
            if points:
                x, y, _ = zip(*points, strict=True)
                axes.plot(x, y, color=look.colour, linestyle=look.dash, linewidth=1.5, label=method)
                for place, value, basis in points:
                    face = look.colour if basis == "measured" else "white"
                    axes.plot(place, value, marker=look.marker, color=look.colour, markerfacecolor=face, markersize=6)
        for method, (colour, dash, marker) in _PUBLISHED.items():
            read = published.parallel_efficiency if study == "weak" else published.speedups
            name = f"published {method}" + (", naive" if method == "BP" else "")
            curve = read(study, method)
            axes.plot(*zip(*curve.items(), strict=True), color=colour, linestyle=dash, marker=marker, label=name)
        most = max(row["stages"] for row in own)
        ideal = [1.0 if study == "weak" else stages for stages in (1, most)]
        axes.plot((1, most), ideal, color="#bbbbbb", linewidth=4, zorder=0, label="one stage, times stages")
        _finish(axes, "stages", label, title.format(layers=max(row["layers"] for row in own)))
        axes.set_xticks(sorted({row["stages"] for row in own} | set(published.SECONDS[study]["AL"])))
        axes.set_ylim(bottom=0)
    note = "hollow: computed from busy times. " if any(row["basis"] == "computed" for row in rows) else ""
    figure.supxlabel(f"{note}Published: {published.SOURCE}", fontsize=8, color="#555555")
    _legend(figure, panels[0], "outside upper center", columns=3 if len(studies) == 1 else 5)
    return _save(figure, path)


def draw_ratios(rows: Sequence[Row], path: Path) -> list[Path]:
    """Draws the speed of streaming relative to 1F1B over M, with its bounds: one panel per model.

    Returns:
        The files: PNG and SVG.
    """
    by_model = groups(rows, "model")
    figure, panels = _panels(len(by_model), size=(5.4 * len(by_model), 4.6))
    for axes, own in zip(panels, by_model, strict=True):
        own.sort(key=lambda row: row["micro_batches"])
        numbers = [row["micro_batches"] for row in own]
        for column, (label, look) in _RATIOS.items():
            axes.plot(numbers, [row[column] for row in own], label=label, **_style(look))
        low, high = ([row[name] for row in own] for name in ("ratio_low", "ratio_high"))
        axes.fill_between(numbers, low, high, color=palette.BLUE, alpha=0.15)
        axes.axhline(1.0, color="#bbbbbb", linewidth=1.5, zorder=0)
        _doubling(axes, numbers)
        _finish(axes, "M, micro-batches per batch", "streaming over 1F1B, samples per second", own[0]["model"])
    _legend(figure, panels[0], "outside upper center", columns=3)
    return _save(figure, path)


def draw_results(results: Results, path: Path) -> list[Path]:
    """Redraws the figure of a results file, if its kind has one."""
    draw = {"scaling": draw_scaling, "bound": draw_ratios, "slow_link": draw_slow_link}.get(results.kind)
    return draw(results.rows, path) if draw else []


# ---- slow links ------------------------------------------------------------------------------------------

_FORMS = {
    ("streaming", "fp32"): ("AL fp32", palette.METHODS["streaming"]),
    ("streaming", "bf16"): ("AL bf16", palette.Look(palette.SKY, "--", "s")),
    ("streaming", "int8"): ("AL int8", palette.Look(palette.GREEN, "-.", "D")),
    ("bp_1f1b", "fp32"): ("1F1B", palette.METHODS["bp_1f1b"]),
}
_THROUGHPUT = {
    "samples_per_s": "samples per second",
    "relative_to_unlimited": "share of the throughput without a limit",
}


def draw_slow_link(rows: Sequence[Row], path: Path) -> list[Path]:
    """Draws samples per second and throughput relative to no limit over the rate, with the published numbers.

    Returns:
        The files: PNG and SVG.
    """
    rates = sorted({row["rate_mbit"] for row in rows if row["rate_mbit"] is not None})
    places = {**{rate: place for place, rate in enumerate(rates)}, None: len(rates)}
    figure, panels = _panels(2, size=(10, 4.2))
    for axes, (column, title) in zip(panels, _THROUGHPUT.items(), strict=True):
        for form, (label, look) in _FORMS.items():
            own = {row["rate_mbit"]: row[column] for row in rows if (row["method"], row["message_dtype"]) == form}
            along = sorted((places[rate], value) for rate, value in own.items())
            axes.plot(*zip(*along, strict=True), label=label, **_style(look))
        axes.set_xticks(range(len(rates) + 1), [*(f"{rate:g}" for rate in rates), "no limit"])
        axes.set_xlabel("Mbit/s, each way")
        axes.set_title(title, loc="left", fontsize=12)
        axes.set_ylim(bottom=0)
        _bare(axes)
    if published.SLOW_LINK_MBIT in places:
        for method, change in published.SLOW_LINK.items():
            look = _FORMS[method, "fp32"][1]
            panels[1].scatter(
                places[published.SLOW_LINK_MBIT],
                1 + change,
                s=90,
                facecolors="none",
                edgecolors=look.colour,
                marker=look.marker,
                zorder=3,
                label=f"published, {'local learning' if method == 'streaming' else 'back-propagation'}",
            )
    _legend(figure, panels[1], "outside lower center", columns=3, size=None)
    return _save(figure, path)


# ---- many stages, predicted ------------------------------------------------------------------------------

_SCALE = {
    **palette.METHODS,
    OVERLAPPED: palette.Look(palette.VERMILION, ":", "v"),
    "streaming, one step per batch": palette.Look(palette.BLUE, ":", "s"),
    "bound (M + P - 1) / (M rho)": palette.Look(palette.GREY, "-", ""),
}


def draw_scale(rows: Sequence[Row], folder: Path) -> dict[str, list[Path]]:
    """Draws ``scale-links``, ``scale-sweep`` and ``scale-stragglers``, each as PNG and SVG, by name."""
    drawn = {"links": _links(rows), "sweep": _many_micro_batches(rows), "stragglers": _stragglers(rows)}
    return {name: _save(figure, folder / f"scale-{name}.png") for name, figure in drawn.items()}


def _links(rows: Sequence[Row]) -> Any:
    own = rows_of(rows, section="links", workload=LARGE.name)
    least = own[0]["micro_batches"]
    counts = list(dict.fromkeys(row["stages"] for row in own))
    figure, panels = _panels(len(counts), size=(4.6 * len(counts), 4.2), sharey=True)
    for axes, stages in zip(panels, counts, strict=True):
        case = rows_of(own, stages=stages, micro_batches=least)
        for method in dict.fromkeys(row["method"] for row in case):
            values = [row_of(case, method=method, link=link)["times_compute"] for link in LINKS]
            label = f"{method} (formula)" if method in FORMULA else method
            axes.plot(list(LINKS), values, markersize=5, label=label, **_style(_SCALE[method]))
        axes.set_yscale("log")
        _finish(
            axes, "link", "time, times the twin's compute" if axes is panels[0] else "", f"P = {stages}, M = {least}"
        )
    _legend(figure, panels[0], "outside lower center", columns=4)
    return figure


def _many_micro_batches(rows: Sequence[Row]) -> Any:
    curves = series(rows)
    figure, (axes,) = _panels(1, size=(7.5, 5.2))
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), markersize=5, label=name, **_style(_SCALE[name]))
    axes.axhline(1.0, color="black", linewidth=0.8)
    _doubling(axes, [m for m, _ in next(iter(curves.values()))])
    stages = rows_of(rows, section="sweep")[0]["stages"]
    _finish(axes, "M, micro-batches per batch", "times as fast as 1F1B", f"P = {stages}")
    _legend(figure, axes, "outside lower center", columns=2)
    return figure


def _stragglers(rows: Sequence[Row]) -> Any:
    own = rows_of(rows, section="stragglers", method="streaming")
    counts = list(dict.fromkeys(row["stages"] for row in own))
    jitters = list(dict.fromkeys(row["jitter"] for row in own))
    figure, panels = _panels(len(counts), size=(4.6 * len(counts), 4.2), sharey=True)
    for axes, stages in zip(panels, counts, strict=True):
        for number, jitter in enumerate(jitters):
            case = rows_of(own, stages=stages, jitter=jitter)
            shares, spreads = zip(*(share_of_alone(row) for row in case), strict=True)
            depths = [row["queue_depth"] for row in case]
            look = palette.Look(
                *(each[number % len(each)] for each in (palette.SERIES, palette.DASHES, palette.MARKERS))
            )
            axes.errorbar(depths, shares, yerr=spreads, markersize=5, capsize=2, label=jitter, **_style(look))
        _doubling(axes, sorted({row["queue_depth"] for row in own}))
        label = "throughput, of a stage alone" if axes is panels[0] else ""
        _finish(axes, "queue depth, messages", label, f"streaming, P = {stages}")
    _legend(figure, panels[0], "outside lower center", columns=4)
    return figure


# ---- a sweep of methods ----------------------------------------------------------------------------------

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
        The files: PNG and SVG; empty if no run has a result, or none that all of them have.
    """
    from matplotlib.ticker import MaxNLocator

    done = [result for result in results if "failure" not in result]
    part = next((part for part in ("test", "validation") if all(r[f"{part}_accuracy"] for r in done)), None)
    if not done or part is None:
        return []
    column = f"{part}_accuracy"
    figure, panels = _panels(4, size=(19, 8.2), lines=2)
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
        label = method if layers is None else f"{method}, K = {layers}"
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
    _finish(epochs, "epoch", "validation accuracy, %", "over epochs")
    _finish(seconds, "seconds of training", "validation accuracy, %", "over time")
    _finish(operations, "operations, in epochs of the twin", "validation accuracy, %", "over operations")
    _finish(depth, "K, number of AL layers", f"{part} accuracy, %", "by number of layers; line: back-propagation")
    _finish(exits, "exit after layer", f"{part} accuracy, %", "at each exit")
    _finish(cost, "operations per sample, % of the full path", "test accuracy, %", "each sample at its first sure exit")
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
    return _save(figure, path)


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


# ---- language models -------------------------------------------------------------------------------------


def draw_perplexity(table: Sequence[Row], path: Path) -> list[Path]:
    """Draws the perplexity of each exit by budget and K; what has one exit, the twin among them, is a line across.

    Returns:
        The file, a PNG.
    """
    local = [row for row in table if row["K"] > 1]
    depths = sorted({row["K"] for row in local}) or [1]
    budgets = list(dict.fromkeys(row["budget"] for row in local)) or ["tokens"]
    styles = zip(cycle(palette.SERIES), cycle(palette.MARKERS), strict=False)
    looks = dict(zip(dict.fromkeys(row["method"] for row in local), styles, strict=False))
    size = (4.5 * len(depths), 4.2 * len(budgets))
    figure, panels = _panels(len(depths), lines=len(budgets), size=size)
    shown = [(budget, layers) for budget in budgets for layers in depths]
    for axes, (budget, layers) in zip(panels, shown, strict=True):
        exits = range(1, layers + 1)
        for row in local:
            if (row["budget"], row["K"]) == (budget, layers):
                colour, marker = looks[row["method"]]
                axes.plot(exits, row["exits"], color=colour, marker=marker, label=row["method"])
        for row in table:
            of_twin = "tokens" if budget == "operations" else budget  # it has the same run at both
            if row["K"] == 1 and row["budget"] == (of_twin if row["method"] == TWIN else budget):
                dash = "--" if row["method"] == TWIN else ":"
                axes.axhline(row["perplexity"], color="black", linestyle=dash, label=row["method"])
        axes.set(title=f"{TITLES[budget]}, K = {layers}", xlabel="exit after layer", ylabel="test perplexity")
        axes.set(xticks=exits)
        axes.grid(alpha=0.3)
    _legend(figure, panels[0], "outside upper center", columns=6)
    return _save(figure, path, suffixes=(".png",), dpi=120)


# ---- all of them -----------------------------------------------------------------------------------------


def _panels(columns: int, *, size: tuple[float, float], lines: int = 1, sharey: bool = False) -> tuple[Any, list[Axes]]:
    """Returns a figure and its panels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(lines, columns, squeeze=False, sharey=sharey).flat)


def _style(look: palette.Look) -> dict[str, str]:
    return {"color": look.colour, "linestyle": look.dash, "marker": look.marker}


def _doubling(axes: Axes, ticks: Sequence[int]) -> None:
    """Sets a base-2 logarithmic x axis with these ticks."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])


def _finish(axes: Axes, x: str, y: str, title: str) -> None:
    axes.set_xlabel(x, fontsize=11)
    axes.set_ylabel(y, fontsize=11)
    axes.set_title(title, loc="left", fontsize=12)
    _bare(axes)


def _bare(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Any, axes: Axes, place: str, *, columns: int, size: float | None = 10) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc=place, ncols=columns, frameon=False, fontsize=size)


def _save(figure: Any, path: Path, *, suffixes: Sequence[str] = (".png", ".svg"), dpi: int = 130) -> list[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_suffix(suffix) for suffix in suffixes]
    for file in files:
        figure.savefig(file, dpi=dpi, facecolor="white")
    return files
