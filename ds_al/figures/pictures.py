"""Common functions of all pictures: matplotlib without display and global state, white background, saving."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


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


def save(figure: Any, path: Path, *, suffixes: Sequence[str], dpi: int) -> list[Path]:
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
