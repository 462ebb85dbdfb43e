"""Common functions of all pictures: matplotlib without display and global state, white background, saving."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds_al.figures import palette


def blank(rows: int, columns: int, *, size: tuple[float, float], **options: Any) -> tuple[Any, list[Any]]:
    """Returns a white figure of this size, in inches, and its panels, row by row.

    Args:
        rows, columns: number of rows and columns of panels.
        size: width and height of the figure.
        options: options of matplotlib's ``Figure.subplots``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for axes in panels:
        axes.set_facecolor("white")
    return figure, panels


def style(look: palette.Look) -> dict[str, str]:
    """Returns colour, dash and marker of a line as matplotlib's ``plot`` takes them."""
    return {"color": look.colour, "linestyle": look.dash, "marker": look.marker}


def doubling(axes: Any, ticks: Sequence[int]) -> None:
    """Sets a base-2 logarithmic x axis with these ticks."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])


def finish(axes: Any, x: str, y: str, title: str) -> None:
    """Names a panel and its axes, and draws its grid."""
    axes.set_xlabel(x, fontsize=11)
    axes.set_ylabel(y, fontsize=11)
    axes.set_title(title, loc="left", fontsize=12)
    bare(axes)


def bare(axes: Any) -> None:
    """Draws the grid, and no frame above and on the right."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def legend(figure: Any, axes: Any, place: str, *, columns: int, size: float | None = 10) -> None:
    """Draws one legend for the figure, of the lines of one panel."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc=place, ncols=columns, frameon=False, fontsize=size)


def save(figure: Any, path: Path, *, suffixes: Sequence[str] = (".png", ".svg"), dpi: int = 130) -> list[Path]:
    """Saves the figure, and creates its folder.

    Args:
        figure: the figure.
        path: path of the file; its suffix is replaced by each of ``suffixes``.
        suffixes: file formats.
        dpi: resolution of PNG files.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_suffix(suffix) for suffix in suffixes]
    for file in files:
        figure.savefig(file, dpi=dpi, facecolor="white")
    return files


def plain(text: str) -> str:
    """Escapes text for matplotlib, where a dollar sign would start a formula."""
    return text.replace("$", r"\$")
