"""The timeline: a picture of what stages computed, and their idle share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ds_al.figures import timeline
from ds_al.figures.timeline import draw
from ds_al.trace import Event
from ds_al.trace.analysis import idle_share, span

RUN = [
    Event(0, "LoadMicroBatch", 0, -5.0, 0.0),  # not computing: outside of what counts
    Event(0, "ForwardPass", 0, 0.0, 1.0),
    Event(0, "BackwardPass", 0, 1.0, 2.0),
    Event(1, "RecvActivation", 0, 0.0, 1.0),
    Event(1, "ForwardPass", 0, 1.0, 2.0),
    Event(1, "BackwardPass", 0, 2.0, 3.0),
    Event(1, "OptimizerStep", 0, 3.0, 4.0),
    Event(1, "SendGrad", 0, 4.0, 9.0),
]


def test_waiting_is_idle() -> None:
    assert span(RUN) == (0.0, 4.0)
    assert idle_share(RUN) == pytest.approx(3 / 8)


def test_draws_png_and_svg(tmp_path: Path) -> None:
    files = draw({"streaming": RUN, "bp_1f1b": RUN}, tmp_path / "new" / "run.png", micro_batches=1)
    assert [file.name for file in files] == ["run.png", "run.svg"]
    assert files[0].read_bytes().startswith(b"\x89PNG")
    assert "<svg" in files[1].read_text()


def test_the_expected_bubble_stands_beside_the_measured_one(tmp_path: Path) -> None:
    _, svg = draw({"streaming": RUN}, tmp_path / "run.png", micro_batches=1, expected={"streaming": 0.25})
    assert "streaming: 4.00 s, idle 38%, formula 25%" in svg.read_text()


def test_each_copy_of_a_stage_has_a_row(tmp_path: Path) -> None:
    other = [replace(event, copy=1) for event in RUN]
    _, svg = draw({"streaming": [*RUN, *other]}, tmp_path / "run.png", micro_batches=1)
    text = svg.read_text()
    assert all(f"copy {copy}, stage {stage}" in text for copy in (0, 1) for stage in (0, 1))


def test_a_run_without_computation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bp_1f1b: got 1 events, none a forward or backward"):
        draw({"bp_1f1b": RUN[:1]}, tmp_path / "run.png", micro_batches=1)


def test_memory_of_all_methods_is_drawn_on_one_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first panel's limits once held for all of them, so that a method of much memory left its panel."""
    drawn = []
    monkeypatch.setattr(timeline, "_save", lambda figure, path: drawn.append(figure) or [path])
    held = {
        name: [Event(0, "ForwardPass", 0, 0.0, 1.0, memory=size), Event(0, "BackwardPass", 0, 1.0, 2.0, memory=size)]
        for name, size in {"streaming": 2**20, "bp_gpipe": 64 * 2**20}.items()
    }
    timeline.draw_memory(held, tmp_path / "memory.png")
    limits = {axes.get_ylim() for axes in drawn[0].axes}
    assert len(limits) == 1 and limits.pop()[1] > 64
