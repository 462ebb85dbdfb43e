"""What all pictures share: matplotlib without a display and without global state, white paper, their files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def blank(rows: int, columns: int, *, size: tuple[float, float], **options: Any) -> tuple[Any, list[Any]]:
    """A white figure of this size, in inches, and its panels, row after row.

    Args:
        options: of matplotlib's ``Figure.subplots``.
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
    """Writes the figure, creating its folder.

    Args:
        path: its suffix is replaced by each of ``suffixes``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_suffix(suffix) for suffix in suffixes]
    for file in files:
        figure.savefig(file, dpi=dpi, facecolor="white")
    return files


def plain(text: str) -> str:
    """Text that matplotlib shows as it is: a dollar sign would start a formula."""
    return text.replace("$", r"\$")
