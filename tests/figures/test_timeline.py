"""Timelines and memory as pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from ds_al.figures import charts, palette, timeline
from ds_al.figures.parts import Chart, Series, Slice, Timeline

RUN = Timeline(
    "streaming: 4.00 s",
    rows=["stage 0", "stage 1"],
    slices=[
        *(Slice(0, kind, 1.0 * i, i + 1.0) for i, kind in enumerate(palette.KINDS)),
        Slice(1, "forward", 0.0, 1.0, label="7"),
        Slice(1, "forward", 1.0, 1.5, nested=True),
    ],
    end=12.0,
    path=[(1, 0.0, 1.0)],
)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
    return figures


def test_draws_png_and_svg(tmp_path: Path) -> None:
    files = timeline.draw([RUN, RUN], tmp_path / "new" / "run.png", suffixes=(".png", ".svg"))
    assert [file.name for file in files] == ["run.png", "run.svg"]
    assert files[0].read_bytes().startswith(b"\x89PNG")
    assert "<svg" in files[1].read_text()


def test_every_kind_is_in_the_legend(tmp_path: Path, drawn: list[Figure]) -> None:
    timeline.draw([RUN], tmp_path / "run.png")
    names = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert names == [*palette.KINDS, "idle", "critical path"]
    looks = {tuple(palette.KINDS[kind]) for kind in palette.KINDS}
    assert len(looks) == len(palette.KINDS)  # no two look the same


def test_labels_are_left_out_where_there_is_no_room(tmp_path: Path, drawn: list[Figure]) -> None:
    long = Timeline("", RUN.rows, [*RUN.slices, Slice(1, "forward", 900.0, 1000.0, label="8")], end=1000.0)
    timeline.draw([RUN], tmp_path / "run.png")
    timeline.draw([long], tmp_path / "run.png")
    assert [[text.get_text() for text in figure.axes[0].texts] for figure in drawn] == [["7"], ["8"]]


def test_memory_of_all_methods_is_drawn_on_one_scale(tmp_path: Path, drawn: list[Figure]) -> None:
    """The first panel's limits once held for all of them, so that a method of much memory left its panel."""
    panels = [
        Chart(name, "seconds", "MiB", [Series("stage 0", x=[1.0, 2.0], y=[size, size], style=0, look="steps")])
        for name, size in {"streaming": 1.0, "bp_gpipe": 64.0}.items()
    ]
    charts.draw(panels, tmp_path / "memory.png", shared=True)
    limits = {axes.get_ylim() for axes in drawn[0].axes}
    assert len(limits) == 1 and limits.pop() == (0, pytest.approx(1.06 * 64))
