"""Formulas of the rivals, beside executions of the very schedules that the engines run."""

from __future__ import annotations

import pytest
from deepspeed.runtime.pipe import schedule

from ds_al.planner.formulas import held_graphs, ideal_seconds

Message = tuple[int, int, int]
"""From, to, and its number on this way."""


def program(stage: int, *, stages: int, micro_batches: int, times: dict[str, float]) -> list[float | list[Message]]:
    """Seconds of computing, and the messages that each ``CommitP2P`` completes."""
    steps: list[float | list[Message]] = []
    queued: list[Message] = []
    numbers: dict[tuple[int, int], int] = {}
    for step in schedule.DualPipeVSchedule(micro_batches, stages, stage):
        for one in step:
            name = type(one).__name__
            if name == "CommitP2P":
                steps.append(queued)
                queued = []
            elif name in times:
                steps.append(times[name])
            elif name in ("SendActivation", "RecvActivation", "SendGrad", "RecvGrad"):
                later = (name in ("SendActivation", "RecvGrad")) == (one.phase == 0)
                other = stage + 1 if later else stage - 1
                way = (stage, other) if name.startswith("Send") else (other, stage)
                numbers[way] = numbers.get(way, -1) + 1
                queued.append((*way, numbers[way]))
    return steps


def seconds_of_dualpipev(stages: int, micro_batches: int, forward: float, backward: float) -> float:
    """A commit ends once all its messages are posted at both ends."""
    times = {"ForwardPass": forward / 2, "BackwardPass": backward / 2}
    programs = [program(s, stages=stages, micro_batches=micro_batches, times=times) for s in range(stages)]
    clock, at = [0.0] * stages, [0] * stages
    posted: dict[Message, dict[int, float]] = {}
    moved = True
    while moved:
        moved = False
        for s, steps in enumerate(programs):
            while at[s] < len(steps):
                step = steps[at[s]]
                if isinstance(step, float):
                    clock[s] += step
                else:
                    for message in step:
                        posted.setdefault(message, {}).setdefault(s, clock[s])
                    if any(len(posted[message]) < 2 for message in step):
                        break
                    clock[s] = max([clock[s], *(time for message in step for time in posted[message].values())])
                at[s], moved = at[s] + 1, True
    assert at == [len(steps) for steps in programs]
    return max(clock)


@pytest.mark.skipif(not hasattr(schedule, "DualPipeVSchedule"), reason="DeepSpeed 0.19.8")
@pytest.mark.parametrize("stages", [2, 3, 4, 8])
@pytest.mark.parametrize("backward", [0.5, 1.0, 1.2, 1.5, 2.0, 3.0])
def test_dualpipev_takes_the_time_of_its_formula(stages: int, backward: float) -> None:
    for micro_batches in (2 * stages, 2 * stages + 3, 4 * stages):
        options = {"stages": stages, "micro_batches": micro_batches, "forward": 1.0, "backward": backward}
        assert ideal_seconds("bp_dualpipev", batches=1, **options) == pytest.approx(
            seconds_of_dualpipev(stages, micro_batches, 1.0, backward)
        )


def test_rivals_at_equal_times() -> None:
    """Figures of the published schedules, f = b_in = b_w = 1, P = 4, M = 8: ZB-H1 27, DualPipeV 31, 1F1B 33."""
    times = {
        method: ideal_seconds(method, stages=4, micro_batches=8, batches=1, forward=1.0, backward=2.0)
        for method in ("bp_1f1b", "bp_dualpipev", "bp_zb_h1", "bp_zb_h2", "bp_async")
    }
    assert times == {"bp_1f1b": 33, "bp_dualpipev": 31, "bp_zb_h1": 27, "bp_zb_h2": 27, "bp_async": 33}
    many = {
        method: ideal_seconds(method, stages=4, micro_batches=8, batches=10, forward=1.0, backward=2.0)
        for method in times
    }
    assert many == {"bp_1f1b": 330, "bp_dualpipev": 310, "bp_zb_h1": 270, "bp_zb_h2": 243, "bp_async": 249}
    assert held_graphs("bp_zb_h2", stages=4, micro_batches=8) == 7
