"""Draws scaling, streaming over 1F1B, and slow links, in the styles of :mod:`ds_al.figures.palette`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ds_al.figures import palette
from ds_al.figures.pictures import bare, blank, doubling, finish, legend, save, style
from ds_al.studies.bench import published
from ds_al.studies.results import Results, Row
from ds_al.studies.tables.write import groups

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
    figure, panels = blank(1, len(studies), size=(6.2 * len(studies), 5.2))
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
        finish(axes, "stages", label, title.format(layers=max(row["layers"] for row in own)))
        axes.set_xticks(sorted({row["stages"] for row in own} | set(published.SECONDS[study]["AL"])))
        axes.set_ylim(bottom=0)
    note = "hollow: computed from busy times. " if any(row["basis"] == "computed" for row in rows) else ""
    figure.supxlabel(f"{note}Published: {published.SOURCE}", fontsize=8, color="#555555")
    legend(figure, panels[0], "outside upper center", columns=3 if len(studies) == 1 else 5)
    return save(figure, path)


def draw_ratios(rows: Sequence[Row], path: Path) -> list[Path]:
    """Draws the speed of streaming relative to 1F1B over M, with its bounds: one panel per model.

    Returns:
        The files: PNG and SVG.
    """
    by_model = groups(rows, "model")
    figure, panels = blank(1, len(by_model), size=(5.4 * len(by_model), 4.6))
    for axes, own in zip(panels, by_model, strict=True):
        own.sort(key=lambda row: row["micro_batches"])
        numbers = [row["micro_batches"] for row in own]
        for column, (label, look) in _RATIOS.items():
            axes.plot(numbers, [row[column] for row in own], label=label, **style(look))
        low, high = ([row[name] for row in own] for name in ("ratio_low", "ratio_high"))
        axes.fill_between(numbers, low, high, color=palette.BLUE, alpha=0.15)
        axes.axhline(1.0, color="#bbbbbb", linewidth=1.5, zorder=0)
        doubling(axes, numbers)
        finish(axes, "M, micro-batches per batch", "streaming over 1F1B, samples per second", own[0]["model"])
    legend(figure, panels[0], "outside upper center", columns=3)
    return save(figure, path)


def draw_results(results: Results, path: Path) -> list[Path]:
    """Redraws the figure of a results file, if its kind has one."""
    draw = {"scaling": draw_scaling, "bound": draw_ratios, "slow_link": draw_slow_link}.get(results.kind)
    return draw(results.rows, path) if draw else []


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
    figure, panels = blank(1, 2, size=(10, 4.2))
    for axes, (column, title) in zip(panels, _THROUGHPUT.items(), strict=True):
        for form, (label, look) in _FORMS.items():
            own = {row["rate_mbit"]: row[column] for row in rows if (row["method"], row["message_dtype"]) == form}
            along = sorted((places[rate], value) for rate, value in own.items())
            axes.plot(*zip(*along, strict=True), label=label, **style(look))
        axes.set_xticks(range(len(rates) + 1), [*(f"{rate:g}" for rate in rates), "no limit"])
        axes.set_xlabel("Mbit/s, each way")
        axes.set_title(title, loc="left", fontsize=12)
        axes.set_ylim(bottom=0)
        bare(axes)
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
    legend(figure, panels[1], "outside lower center", columns=3, size=None)
    return save(figure, path)
