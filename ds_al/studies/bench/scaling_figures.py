"""Pictures of the scaling studies, with the published curve beside ours; of measured ratios beside their bound."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_al.figures import palette
from ds_al.studies.bench import published

Row = Mapping[str, Any]

_PUBLISHED = {"AL": ("#444444", "-", "*"), "BP": ("#444444", "--", "x")}
_TITLES = {"weak": "weak: k layers on k stages", "strong": "strong: {layers} layers"}


def draw_scaling(rows: Sequence[Row], path: Path) -> list[Path]:
    """Draws parallel efficiency in the weak study and speed-up in the strong one, over stages.

    Args:
        rows: of one workload. A point that was computed, not measured, is hollow.
        path: where the picture goes; its suffix is replaced.

    Returns:
        The files: PNG and SVG; none where no row has a speed-up.
    """
    studies = [s for s in _TITLES if any(r["study"] == s and r["speedup"] is not None for r in rows)]
    if not studies:
        return []
    figure = _figure(width=6.2 * len(studies), height=5.2)
    for axes, study in zip(figure.subplots(1, len(studies), squeeze=False).flat, studies, strict=True):
        own = [r for r in rows if r["study"] == study and r["speedup"] is not None]
        column = "parallel_efficiency" if study == "weak" else "speedup"
        for method, (colour, dash, marker) in palette.METHODS.items():
            points = sorted((r["stages"], r[column], r["basis"]) for r in own if r["method"] == method)
            if points:
                x, y, _ = zip(*points, strict=True)
                axes.plot(x, y, color=colour, linestyle=dash, linewidth=1.5, label=method)
                for place, value, basis in points:
                    face = colour if basis == "measured" else "white"
                    axes.plot(place, value, marker=marker, color=colour, markerfacecolor=face, markersize=6)
        for method, (colour, dash, marker) in _PUBLISHED.items():
            read = published.parallel_efficiency if study == "weak" else published.speedups
            curve = read(study, method)
            label = f"published {method}" + (", naive" if method == "BP" else "")
            axes.plot(*zip(*curve.items(), strict=True), color=colour, linestyle=dash, marker=marker, label=label)
        most = max(r["stages"] for r in own)
        ideal = [1.0 if study == "weak" else stages for stages in (1, most)]
        axes.plot((1, most), ideal, color="#bbbbbb", linewidth=4, zorder=0, label="one stage, times stages")
        layers = max(r["layers"] for r in own)
        _finish(axes, "stages", _LABELS[column], _TITLES[study].format(layers=layers))
        axes.set_xticks(sorted({r["stages"] for r in own} | set(published.SECONDS[study]["AL"])))
        axes.set_ylim(bottom=0)
    axes = figure.axes[0]
    computed = any(r["basis"] == "computed" for r in rows)
    note = "hollow: computed from busy times. " if computed else ""
    figure.supxlabel(f"{note}Published: {published.SOURCE}", fontsize=8, color="#555555")
    columns = 3 if len(studies) == 1 else 5
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside upper center", ncols=columns, frameon=False, fontsize=10
    )
    return _save(figure, path)


def draw_ratios(rows: Sequence[Row], path: Path) -> list[Path]:
    """Draws how many times as fast as 1F1B streaming is over M, beside its bounds: one panel per model.

    Returns:
        The files: PNG and SVG.
    """
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = _figure(width=5.4 * len(models))
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False).flat, models, strict=True):
        own = sorted((row for row in rows if row["model"] == model), key=lambda row: row["micro_batches"])
        numbers = [row["micro_batches"] for row in own]
        for column, (label, colour, dash, marker) in _RATIOS.items():
            axes.plot(numbers, [r[column] for r in own], color=colour, linestyle=dash, marker=marker, label=label)
        axes.fill_between(
            numbers, [r["ratio_low"] for r in own], [r["ratio_high"] for r in own], color=palette.BLUE, alpha=0.15
        )
        axes.axhline(1.0, color="#bbbbbb", linewidth=1.5, zorder=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(numbers, [str(number) for number in numbers])
        _finish(axes, "M, micro-batches per batch", "streaming over 1F1B, samples per second", model)
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=10
    )
    return _save(figure, path)


_LABELS = {"parallel_efficiency": "speed-up over stages", "speedup": "speed-up over one stage"}
_RATIOS = {
    "ratio": ("measured", *palette.METHODS["streaming"]),
    "bound": ("bound, equal stages", palette.VERMILION, "--", "^"),
    "bound_balanced": ("bound, stages as they are", palette.GREEN, ":", "s"),
}


def _figure(*, width: float, height: float = 4.6) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _finish(axes: Any, x: str, y: str, title: str) -> None:
    axes.set_xlabel(x, fontsize=11)
    axes.set_ylabel(y, fontsize=11)
    axes.set_title(title, loc="left", fontsize=12)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, path: Path) -> list[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_suffix(suffix) for suffix in _SUFFIXES]
    for file in files:
        figure.savefig(file, dpi=130, facecolor="white")
    return files


_SUFFIXES: Iterable[str] = (".png", ".svg")
