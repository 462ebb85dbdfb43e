"""From recorded events to what is drawn: rows, pieces, titles."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ds_al.trace import Event
from ds_al.trace.analysis import idle_share, span
from ds_al.trace.timelines import memory, timeline

RUN = [
    Event(0, "LoadMicroBatch", 0, -5.0, 0.0, wait=5.0),  # not computing: outside of what counts
    Event(0, "ForwardPass", 0, 0.0, 1.0),
    Event(0, "BackwardPass", 0, 1.0, 2.0),
    Event(1, "RecvActivation", 0, 0.0, 1.0, wait=0.75),
    Event(1, "ForwardPass", 0, 1.0, 2.0),
    Event(1, "BackwardPass", 0, 2.0, 3.0),
    Event(1, "OptimizerStep", 0, 3.0, 4.0),
    Event(1, "SendGrad", 0, 4.0, 9.0),
]


def test_waiting_is_idle() -> None:
    assert span(RUN) == (0.0, 4.0)
    assert idle_share(RUN) == pytest.approx(3 / 8)


def test_pieces_are_what_was_computed_and_waited_for() -> None:
    drawn = timeline(RUN, name="streaming", micro_batches=1)
    assert [(piece.row, piece.kind, piece.start, piece.end) for piece in drawn.slices] == [
        (0, "forward", 0.0, 1.0),
        (0, "backward", 1.0, 2.0),
        (1, "waits for a message", 0.0, 0.75),
        (1, "forward", 1.0, 2.0),
        (1, "backward", 2.0, 3.0),
        (1, "step", 3.0, 4.0),
    ]
    assert drawn.end == 4.0 and drawn.path[-1] == (1, 3.0, 4.0)


def test_micro_batches_are_numbered_in_each_batch() -> None:
    passes = [Event(0, "ForwardPass", number, number, number + 1.0) for number in range(4)]
    drawn = timeline(passes, name="streaming", micro_batches=2)
    assert [(piece.label, piece.faint) for piece in drawn.slices] == [
        ("1", False), ("2", False), ("1", True), ("2", True),
    ]  # fmt: skip


def test_the_expected_bubble_stands_beside_the_measured_one() -> None:
    assert timeline(RUN, name="streaming", micro_batches=1, expected=0.25).title == (
        "streaming: 4.00 s, idle 38%, formula 25%"
    )


def test_each_copy_of_a_stage_has_a_row() -> None:
    other = [replace(event, copy=1) for event in RUN]
    rows = timeline([*RUN, *other], name="streaming", micro_batches=1).rows
    assert rows == [f"replica {replica}, stage {stage}" for replica in (0, 1) for stage in (0, 1)]


def test_a_run_without_computation_is_refused() -> None:
    with pytest.raises(ValueError, match="bp_1f1b: got 1 events, none a forward or backward"):
        timeline(RUN[:1], name="bp_1f1b", micro_batches=1)


def test_memory_is_a_line_for_each_stage() -> None:
    chart = memory([replace(event, memory=(1 + event.stage) * 2**20) for event in RUN], name="streaming")
    assert chart.title == "streaming: at most 2 MiB on a stage"
    assert [(series.name, set(series.y)) for series in chart.series] == [("stage 0", {1.0}), ("stage 1", {2.0})]
