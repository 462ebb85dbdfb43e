"""Draws timelines as PNG and SVG files, one above the other: computation and waiting of each stage over time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds_al.figures import palette, pictures
from ds_al.figures.parts import Slice, Timeline

_HEIGHT = 0.8  # height of a bar; rows are 1 apart
_SHORTEST_WAIT, _SHORTEST_LABELLED = 0.002, 0.008  # minimum lengths, as a share of the axis


def draw(timelines: Sequence[Timeline], path: Path, *, suffixes: Sequence[str] = (".png",)) -> list[Path]:
    """Draws one panel per timeline on a common time scale; uncoloured time is idle. Nested slices are omitted.

    Args:
        timelines: the timelines.
        path: path of the picture; its suffix is replaced by each of ``suffixes``.
        suffixes: file formats.

    Returns:
        The files.
    """
    height = sum(0.85 + 0.38 * len(timeline.rows) for timeline in timelines)
    ratios = [0.85 + 0.38 * len(timeline.rows) for timeline in timelines]
    figure, panels = pictures.blank(len(timelines), 1, size=(11, 0.9 + height), sharex=True, height_ratios=ratios)
    limit = max(1.01 * timeline.end if timeline.zoom is None else timeline.zoom for timeline in timelines)
    for axes, timeline in zip(panels, timelines, strict=True):
        _panel(axes, timeline, limit=limit)
    panels[-1].set_xlim(0, limit)
    panels[-1].set_xlabel(timelines[-1].x_label, fontsize=11)
    _legend(figure, timelines)
    return pictures.save(figure, path, suffixes=suffixes, dpi=160)


def _panel(axes: Any, timeline: Timeline, *, limit: float) -> None:
    groups: dict[tuple[str, int, bool], list[Slice]] = defaultdict(list)
    for piece in timeline.slices:
        long_enough = piece.kind in palette.BUSY or piece.end - piece.start > _SHORTEST_WAIT * limit
        if not piece.nested and long_enough and piece.start < limit:
            groups[piece.kind, piece.row, piece.faint].append(piece)
    for (kind, row, faint), pieces in groups.items():
        axes.broken_barh(
            [(piece.start, piece.end - piece.start) for piece in pieces],
            (row - _HEIGHT / 2, _HEIGHT),
            alpha=0.55 if faint else 1.0,
            zorder=3 if kind == "step" else 2,
            **_look(kind),
        )
        for piece in pieces:
            if piece.label and piece.end - piece.start > _SHORTEST_LABELLED * limit:
                middle = (piece.start + piece.end) / 2
                axes.text(middle, row, piece.label, ha="center", va="center", fontsize=10, clip_on=True, zorder=4)
    for row, start, end in timeline.path:
        axes.plot([start, end], [row + 0.46] * 2, color=palette.CRITICAL_PATH, linewidth=2, solid_capstyle="butt")
    if timeline.end < limit:
        axes.axvline(timeline.end, color="0.4", linewidth=1, linestyle=(0, (4, 3)))
    axes.set_title(pictures.plain(timeline.title), loc="left", fontsize=13)
    axes.set_ylim(len(timeline.rows) - 0.5, -0.5)
    axes.set_yticks(range(len(timeline.rows)), timeline.rows, fontsize=11)
    axes.tick_params(axis="x", labelsize=11)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _look(kind: str) -> dict[str, Any]:
    colour, hatch = palette.KINDS[kind]
    if hatch:
        return {"facecolor": "white", "edgecolor": colour, "linewidth": 0, "hatch": 4 * hatch}
    if kind == "step":
        return {"facecolor": colour, "edgecolor": colour, "linewidth": 1.0}  # keeps slices of a millisecond visible
    return {"facecolor": colour, "edgecolor": "white", "linewidth": 0.6 if kind in palette.BUSY else 0}


def _legend(figure: Any, timelines: Sequence[Timeline]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    present = {piece.kind for timeline in timelines for piece in timeline.slices if not piece.nested}
    handles: list[Any] = [Patch(**_look(kind), label=kind) for kind in palette.KINDS if kind in present]
    if any(timeline.path for timeline in timelines):
        handles.append(Patch(facecolor="white", edgecolor="0.6", label="idle"))
        handles.append(Line2D([], [], color=palette.CRITICAL_PATH, linewidth=2, label="critical path"))
    figure.legend(
        handles=handles,
        loc="outside upper right",
        ncols=8,
        frameon=False,
        fontsize=10.5,
        columnspacing=1.2,
        handlelength=1.6,
    )
