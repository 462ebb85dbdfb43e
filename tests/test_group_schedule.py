"""Schedules inside a group, without ranks: no deadlock, the order of micro-batches, and times by the formulas."""

from __future__ import annotations

import pytest
from deepspeed.runtime.pipe.schedule import PipeInstruction

from ds_al.errors import ALConfigError
from ds_al.group_schedule import GROUP_SCHEDULES, Place, fastest, group_graphs, group_seconds

FORWARD, HALVES = 1.0, (1.0, 1.0)
SECONDS = {"ForwardPass": 1.0, "BackwardPass": 2.0, "BackwardInput": 1.0, "BackwardWeight": 1.0}
SENT_BY = {"RecvActivation": -1, "RecvGrad": 1}
SENDS = {"SendActivation": 1, "SendGrad": -1}


def instructions(schedule: str, stage: int, *, size: int, micro_batches: int, steps: int) -> list[PipeInstruction]:
    each = GROUP_SCHEDULES[schedule](micro_batches, Place(stage, size, stage, size))
    return [one for _ in range(steps) for step in each.steps() for one in step]


def simulate(schedule: str, *, size: int, micro_batches: int) -> tuple[float, list[int]]:
    """Returns the period of the slowest stage once it is steady, and the most graphs that each stage held."""
    steps = 6
    options = {"size": size, "micro_batches": micro_batches, "steps": steps}
    programs = [[type(one).__name__ for one in instructions(schedule, s, **options)] for s in range(size)]
    clock, at, alive, peak = [0.0] * size, [0] * size, [0] * size, [0] * size
    sent: dict[tuple[int, int], list[float]] = {}
    taken: dict[tuple[int, int], int] = {}
    ends: list[list[float]] = [[] for _ in range(size)]
    moved = True
    while moved:
        moved = False
        for s, program in enumerate(programs):
            while at[s] < len(program):
                name = program[at[s]]
                if name in SENT_BY:
                    link = (s + SENT_BY[name], s)
                    if taken.get(link, 0) == len(sent.get(link, [])):
                        break
                    clock[s] = max(clock[s], sent[link][taken.get(link, 0)])
                    taken[link] = taken.get(link, 0) + 1
                elif name in SENDS:
                    sent.setdefault((s, s + SENDS[name]), []).append(clock[s])
                clock[s] += SECONDS.get(name, 0.0)
                alive[s] += (name == "ForwardPass") - (name in ("BackwardPass", "BackwardWeight"))
                peak[s] = max(peak[s], alive[s])
                if name == "OptimizerStep":
                    ends[s].append(clock[s])
                at[s], moved = at[s] + 1, True
    assert all(at[s] == len(program) for s, program in enumerate(programs)), "the stages wait for each other"
    return max(each[-1] - each[-2] for each in ends), peak


@pytest.mark.parametrize("schedule", GROUP_SCHEDULES)
@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("micro_batches", [1, 2, 3, 4, 8, 16])
def test_times_and_memory_are_those_of_the_formulas(schedule: str, size: int, micro_batches: int) -> None:
    period, peak = simulate(schedule, size=size, micro_batches=micro_batches)
    options = {"size": size, "micro_batches": micro_batches}
    assert period == pytest.approx(group_seconds(schedule, forward=FORWARD, halves=HALVES, **options))
    assert max(peak) == group_graphs(schedule, **options)
    buffers = [
        GROUP_SCHEDULES[schedule](micro_batches, Place(s, size, s, size)).num_pipe_buffers() for s in range(size)
    ]
    assert buffers == peak


@pytest.mark.parametrize("schedule", GROUP_SCHEDULES)
def test_zero_bubble_has_no_idle_time_from_2g_minus_1_micro_batches_on(schedule: str) -> None:
    period, _ = simulate(schedule, size=4, micro_batches=7)
    assert (period == 7 * 3) == (schedule == "zb_h2")


@pytest.mark.parametrize("schedule", GROUP_SCHEDULES)
def test_gradients_accumulate_in_the_order_of_micro_batches(schedule: str) -> None:
    """The order of summation decides the bits of a gradient."""
    for stage in range(4):
        own = instructions(schedule, stage, size=4, micro_batches=8, steps=1)
        buffers = GROUP_SCHEDULES[schedule](8, Place(stage, 4, stage, 4)).num_pipe_buffers()
        for kinds in (("ForwardPass",), ("BackwardPass", "BackwardInput"), ("BackwardPass", "BackwardWeight")):
            order = [one.kwargs["buffer_id"] for one in own if type(one).__name__ in kinds]
            assert order == [m % buffers for m in range(8)]


def test_auto_takes_the_fastest_schedule_whose_graphs_fit() -> None:
    assert fastest(size=4, micro_batches=8) == "zb_h2"
    assert fastest(size=4, micro_batches=8, graphs=6) == "zb_h1"
    assert (
        fastest(size=2, micro_batches=2) == "zb_h1"
    )  # which then holds as few graphs as 1f1b, and zb_h2 gains nothing
    assert fastest(size=4, micro_batches=8, together=True) == fastest(size=1, micro_batches=8) == "1f1b"
    with pytest.raises(ALConfigError, match=r'"group_graphs": got 3: .* at least 4 of 8 micro-batches'):
        fastest(size=4, micro_batches=8, graphs=3)
