"""Pictures of the predictions for many stages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds_al.figures import palette
from ds_al.studies.scale.predictions import LARGE, LINKS, OVERLAPPED
from ds_al.studies.scale.views import FORMULA, SHOWN, Row, row_of, rows_of, series, share_of_alone


def draw(rows: Sequence[Row], folder: Path) -> dict[str, list[Path]]:
    """Draws ``scale-links``, ``scale-sweep`` and ``scale-stragglers``, each as PNG and SVG, by name."""
    return {
        "links": _draw_links(rows, folder / "scale-links.png"),
        "sweep": _draw_sweep(rows, folder / "scale-sweep.png"),
        "stragglers": _draw_stragglers(rows, folder / "scale-stragglers.png"),
    }


def _figure(columns: int, height: float = 3.8) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * columns, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(1, columns, squeeze=False, sharey=True).flat)
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _save(figure: Any, panels: Sequence[Any], path: Path, *, columns: int = 4) -> list[Path]:
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    for file in files:
        figure.savefig(file, dpi=130, facecolor="white")
    return files


_LOOKS = {
    **palette.METHODS,
    OVERLAPPED: palette.Look(palette.VERMILION, ":", "v"),
    "streaming, one step per batch": palette.Look(palette.BLUE, ":", "s"),
    "bound (M + P - 1) / (M rho)": palette.Look(palette.GREY, "-", ""),
}


def _draw_links(rows: Sequence[Row], path: Path) -> list[Path]:
    own = rows_of(rows, section="links", workload=LARGE.name)
    least = own[0]["micro_batches"]
    counts = list(dict.fromkeys(row["stages"] for row in own))
    figure, panels = _figure(len(counts), 4.2)
    for axes, stages in zip(panels, counts, strict=True):
        case = rows_of(own, stages=stages, micro_batches=least)
        for method in SHOWN:
            colour, dash, marker = _LOOKS[method]
            values = [row_of(case, method=method, link=link)["times_compute"] for link in LINKS]
            label = f"{method} (formula)" if method in FORMULA else method
            axes.plot(list(LINKS), values, color=colour, linestyle=dash, marker=marker, markersize=5, label=label)
        axes.set_yscale("log")
        axes.set_title(f"P = {stages}, M = {least}", loc="left", fontsize=12)
        axes.set_xlabel("link", fontsize=11)
    panels[0].set_ylabel("time, times the twin's compute", fontsize=11)
    return _save(figure, panels, path)


def _draw_sweep(rows: Sequence[Row], path: Path) -> list[Path]:
    figure, panels = _figure(1, 4.6)
    figure.set_size_inches(7.5, 5.2)
    for name, points in series(rows).items():
        colour, dash, marker = _LOOKS[name]
        panels[0].plot(
            *zip(*points, strict=True), color=colour, linestyle=dash, marker=marker, markersize=5, label=name
        )
    panels[0].axhline(1.0, color="black", linewidth=0.8)
    counts = [m for m, _ in next(iter(series(rows).values()))]
    panels[0].set_xscale("log", base=2)
    panels[0].set_xticks(counts, [str(m) for m in counts])
    panels[0].set_xlabel("M, micro-batches per batch", fontsize=11)
    panels[0].set_ylabel("times as fast as 1F1B", fontsize=11)
    panels[0].set_title(f"P = {rows_of(rows, section='sweep')[0]['stages']}", loc="left", fontsize=12)
    return _save(figure, panels, path, columns=2)


def _draw_stragglers(rows: Sequence[Row], path: Path) -> list[Path]:
    own = rows_of(rows, section="stragglers", method="streaming")
    counts = list(dict.fromkeys(row["stages"] for row in own))
    jitters = list(dict.fromkeys(row["jitter"] for row in own))
    figure, panels = _figure(len(counts), 4.2)
    for axes, stages in zip(panels, counts, strict=True):
        for number, jitter in enumerate(jitters):
            colour = palette.SERIES[number % len(palette.SERIES)]
            dash, marker = palette.DASHES[number % len(palette.DASHES)], palette.MARKERS[number % len(palette.MARKERS)]
            case = rows_of(own, stages=stages, jitter=jitter)
            shares = [share_of_alone(row) for row in case]
            axes.errorbar(
                [row["queue_depth"] for row in case],
                [share for share, _ in shares],
                yerr=[spread for _, spread in shares],
                color=colour, linestyle=dash, marker=marker, markersize=5, capsize=2, label=jitter,
            )  # fmt: skip
        depths = sorted({row["queue_depth"] for row in own})
        axes.set_xscale("log", base=2)
        axes.set_xticks(depths, [str(depth) for depth in depths])
        axes.set_xlabel("queue depth, messages", fontsize=11)
        axes.set_title(f"streaming, P = {stages}", loc="left", fontsize=12)
    panels[0].set_ylabel("throughput, of a stage alone", fontsize=11)
    return _save(figure, panels, path)
