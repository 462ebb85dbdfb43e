"""Predictions as a table for the terminal and as a picture; speeds of links as people write them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from ds_al.figures import palette
from ds_al.planner.predict import BY_FORMULA, METHODS, Prediction

_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "tbit": 1e12}


def bytes_per_second(text: str) -> float:
    """``"1gbit"``, ``"100mbit"`` and the like as bytes per second.

    Raises:
        ValueError: it is not a number and a unit of bits per second.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit|tbit)", text.strip().lower())
    if match is None or float(match[1]) == 0:
        raise ValueError(f"got {text!r}: expected a speed such as 100mbit, 1gbit or 400gbit")
    return float(match[1]) * _UNITS[match[2]] / 8


def table(predictions: Sequence[Prediction]) -> Table:
    """A row per prediction; the fastest of each P and M is marked."""
    shown = Table(title="per batch", title_justify="left", box=box.SIMPLE_HEAD)
    shown.caption = "* fastest; (f) by formula, at the least"
    shown.caption_justify = "left"
    shown.add_column("method", no_wrap=True)
    for column in ("P", "M", "seconds", "times the best", "bubble", "MB held", "MB sent"):
        shown.add_column(column, justify="right")
    for own in cases(predictions):
        best = min(each.seconds for each in own)
        for each in own:
            shown.add_row(
                each.method + (" (f)" if each.method in BY_FORMULA else "") + (" *" if each.seconds == best else ""),
                str(each.stages),
                str(each.micro_batches),
                f"{each.seconds:.4g}",
                f"{each.seconds / best:.2f}",
                f"{each.bubble:.1%}",
                f"{each.memory_bytes / 1e6:,.0f}",
                f"{each.bytes_per_batch / 1e6:,.1f}",
                end_section=each is own[-1],
            )
    return shown


def markdown(predictions: Sequence[Prediction]) -> str:
    """The same rows as a table for a document; the fastest of each P and M is bold."""
    lines = [
        "| P | M | method | ms per batch | times the best | bubble (least to most) | MB held | MB sent |",
        "|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for own in cases(predictions):
        best = min(each.seconds for each in own)
        for each in own:
            name = f"`{each.method}`" + (" (f)" if each.method in BY_FORMULA else "")
            lines.append(
                f"| {each.stages} | {each.micro_batches} | {f'**{name}**' if each.seconds == best else name} "
                f"| {1000 * each.seconds:.4g} | {each.seconds / best:.2f} "
                f"| {each.bubble:.1%} ({each.bubble_least:.1%} to {each.bubble_most:.1%}) "
                f"| {each.memory_bytes / 1e6:,.0f} | {each.bytes_per_batch / 1e6:,.1f} |"
            )
    return "\n".join(lines) + "\n"


def cases(predictions: Sequence[Prediction]) -> list[list[Prediction]]:
    """Those that share P and M, together."""
    keys = dict.fromkeys((each.stages, each.micro_batches) for each in predictions)
    return [[each for each in predictions if (each.stages, each.micro_batches) == key] for key in keys]


def draw(predictions: Sequence[Prediction], path: Path) -> list[Path]:
    """Draws the time per batch over M, as a multiple of the fastest method's: one panel per number of stages.

    Returns:
        The files: PNG and SVG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no global state
    from matplotlib.figure import Figure

    counts = sorted({each.stages for each in predictions})
    columns = min(len(counts), 2)
    rows = -(-len(counts) // columns)
    figure = Figure(figsize=(5.5 * columns, 3.4 * rows + 0.7), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.set_visible(False)
    for axes, stages in zip(panels, counts, strict=False):
        axes.set_visible(True)
        own = [each for each in predictions if each.stages == stages]
        numbers = sorted({each.micro_batches for each in own})
        best = {m: min(each.seconds for each in own if each.micro_batches == m) for m in numbers}
        for method in (name for name in METHODS if any(each.method == name for each in own)):
            colour, dash, marker = palette.METHODS[method]
            times = {each.micro_batches: each.seconds for each in own if each.method == method}
            axes.plot(
                numbers,
                [times[m] / best[m] for m in numbers],
                color=colour,
                linestyle=dash,
                marker=marker,
                markersize=5,
                label=method,
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(numbers, [str(m) for m in numbers])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_title(f"P = {stages}", loc="left", fontsize=12)
        axes.set_xlabel("M, micro-batches per batch", fontsize=11)
        axes.set_ylabel("time, times the fastest", fontsize=11)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = next(iter(figure.axes)).get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    for file in files:
        figure.savefig(file, dpi=130, facecolor="white")
    return files
