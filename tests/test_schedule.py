"""The schedules: their instructions, that they cannot deadlock, and that they take the time they should.

No process is started: a simulator runs the generators of all stages.
"""

from __future__ import annotations

from collections import deque
from itertools import chain

import pytest
from deepspeed.runtime.pipe.schedule import PipeInstruction

from ds_al.baseline.schedules import BACKPROP_SCHEDULES
from ds_al.planner.formulas import ideal_seconds
from ds_al.schedule import AL_SCHEDULES

SCHEDULES = {**AL_SCHEDULES, **BACKPROP_SCHEDULES}
ZERO_BUBBLE = ("bp_zb_h1", "bp_zb_h2")
SHORT = {
    "LoadMicroBatch": "load",
    "RecvActivation": "recv",
    "ForwardPass": "F",
    "SendActivation": "send",
    "RecvGrad": "recv-grad",
    "BackwardPass": "B",
    "SendGrad": "send-grad",
    "OptimizerStep": "S",
    "Barrier": "|",
    "ReduceGrads": "",
    "ReduceTiedGrads": "",
}
CHANNELS = {"SendActivation": 1, "SendGrad": -1, "RecvActivation": -1, "RecvGrad": 1}  # to which neighbour


def instructions(
    schedule: type, *, micro_batches: int, stages: int, stage: int, **options: int
) -> list[PipeInstruction]:
    """All instructions of one stage, in order."""
    return list(chain.from_iterable(schedule(micro_batches, stages, stage, **options).steps()))


def text(method: str, **place: int) -> str:
    """One stage's instructions in short."""
    names = (SHORT[type(each).__name__] for each in instructions(SCHEDULES[method], **place))
    return " ".join(filter(None, names))


@pytest.mark.parametrize(
    ("method", "stage", "expected"),
    [
        ("streaming", 0, "load F send B load F send B S"),
        ("streaming", 1, "recv F send B recv F send B S"),
        ("streaming", 2, "recv F B recv F B S"),
        ("forward_first", 0, "load F send B load F send B S |"),
        ("forward_first", 2, "recv F B recv F B S |"),
        ("parallel_backward", 0, "load F send | B load F send | B S"),
        ("parallel_backward", 2, "recv F | B recv F | B S"),
        ("sequential", 0, "load F send | B | | | load F send | B | | | S | | |"),
        ("sequential", 1, "recv F send | | B | | recv F send | | B | | | S | |"),
        ("bp_1f1b", 2, "recv load F B send-grad recv load F B send-grad S"),
        ("bp_gpipe", 0, "load F send load F send recv-grad B recv-grad B S"),
        ("bp_gpipe", 1, "recv F send recv F send recv-grad B send-grad recv-grad B send-grad S"),
        ("bp_gpipe", 2, "load recv F load recv F B send-grad B send-grad S"),
        ("bp_naive", 1, "recv F send recv-grad B send-grad recv F send recv-grad B send-grad S"),
    ],
)
def test_instructions_of_one_stage(method: str, stage: int, expected: str) -> None:
    options = {"steps_per_batch": 1} if method in AL_SCHEDULES else {}
    assert text(method, micro_batches=2, stages=3, stage=stage, **options) == expected


@pytest.mark.parametrize("stages", [1, 2, 5])
def test_only_streaming_waits_for_no_later_stage(stages: int) -> None:
    returning = {"Barrier", "SendGrad", "RecvGrad"}
    for method, schedule in SCHEDULES.items():
        names = {
            type(each).__name__
            for stage in range(stages)
            for each in instructions(schedule, micro_batches=4, stages=stages, stage=stage)
        }
        if method == "streaming":
            assert not names & returning
        elif stages > 1:
            assert names & returning, method


@pytest.mark.parametrize("method", AL_SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_al_steps_as_often_as_asked(method: str, steps: int) -> None:
    names = text(method, micro_batches=8, stages=2, stage=1, steps_per_batch=steps).split()
    work = [name for name in names if name in "FBS"]
    assert work == (["F", "B"] * (8 // steps) + ["S"]) * steps


def test_al_schedules_hold_one_micro_batch() -> None:
    assert {schedule(16, 4, 0).num_pipe_buffers() for schedule in AL_SCHEDULES.values()} == {1}


def simulate(method: str, *, stages: int, micro_batches: int, batches: int, rendezvous: bool = False) -> float:
    """Time of all batches when F and B take one unit each, and all else none.

    A receive waits for its message. A send goes on at once or, in ``rendezvous``, when its message has been taken;
    a barrier is passed when all stages have come to it. DeepSpeed ends each backprop batch with a broadcast
    from the last stage.

    Raises:
        AssertionError: a deadlock, or messages that nobody takes.
    """
    programs = [
        [
            type(each).__name__
            for _ in range(batches)
            for each in instructions(SCHEDULES[method], micro_batches=micro_batches, stages=stages, stage=stage)
        ]
        for stage in range(stages)
    ]
    clock, at = [0] * stages, [0] * stages
    wires: dict[tuple[int, int], deque[int]] = {}
    offered: dict[int, tuple[int, int]] = {}  # stage -> wire on which its message waits to be taken
    while True:
        moved = False
        for stage, program in enumerate(programs):
            while at[stage] < len(program) and stage not in offered:
                name = program[at[stage]]
                if name == "Barrier":
                    break
                if name in CHANNELS:
                    other = stage + CHANNELS[name]
                    wire = (stage, other) if name.startswith("Send") else (other, stage)
                    queue = wires.setdefault(wire, deque())
                    if name.startswith("Send"):
                        queue.append(clock[stage])
                        if rendezvous:
                            offered[stage] = wire
                    elif queue:
                        clock[stage] = max(clock[stage], queue.popleft())
                        if offered.get(other) == wire:
                            clock[other] = clock[stage]
                            del offered[other]
                    else:
                        break
                elif name in ("ForwardPass", "BackwardPass"):
                    clock[stage] += 1
                at[stage] += 1
                moved = True
        here = [program[at[stage]] if at[stage] < len(program) else None for stage, program in enumerate(programs)]
        if set(here) == {"Barrier"} and not offered:
            clock, at, moved = [max(clock)] * stages, [position + 1 for position in at], True
        if not moved:
            assert here == [None] * stages and not offered, f"deadlock at {here}"
            assert not any(wires.values()), "a message was sent that nobody takes"
            return max(clock)


@pytest.mark.parametrize("method", [name for name in SCHEDULES if name not in ZERO_BUBBLE])
@pytest.mark.parametrize("stages", range(1, 9))
def test_no_deadlock_and_the_ideal_time(method: str, stages: int) -> None:
    for micro_batches in range(1, 17):
        size = {"stages": stages, "micro_batches": micro_batches}
        ideal = ideal_seconds(method, **size, batches=1, forward=1, backward=1)
        assert simulate(method, **size, batches=1) == ideal, size
        simulate(method, **size, batches=1, rendezvous=True)  # a transport without buffers gets through, too


@pytest.mark.parametrize("method", ZERO_BUBBLE)
def test_zero_bubble_needs_messages_that_block_nobody(method: str) -> None:
    """Its times are those of its formula in tests/planner; DeepSpeed's calls, which block, would never end."""
    simulate(method, stages=4, micro_batches=8, batches=2)
    with pytest.raises(AssertionError, match="deadlock"):
        simulate(method, stages=4, micro_batches=8, batches=2, rendezvous=True)


@pytest.mark.parametrize("method", AL_SCHEDULES)
def test_the_ideal_time_of_several_batches(method: str) -> None:
    for stages, micro_batches in [(1, 3), (2, 1), (4, 8), (8, 3)]:
        size = {"stages": stages, "micro_batches": micro_batches, "batches": 5}
        assert simulate(method, **size) == ideal_seconds(method, **size, forward=1, backward=1)
