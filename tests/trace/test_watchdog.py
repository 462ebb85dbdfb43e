"""What a stalled rank says of itself, and when a job counts as stalled."""

from __future__ import annotations

import pytest
from deepspeed.runtime.pipe import schedule as deepspeed_schedule
from pydantic import ValidationError

from ds_al.baseline.schedules import BACKPROP_SCHEDULES
from ds_al.config.associated_learning import ALConfig
from ds_al.schedule import AL_SCHEDULES
from ds_al.trace.watchdog import Stillness, waits_for


def told(instruction: str | None, *, queue: bool = True) -> str:
    return waits_for(instruction, 7, stage=2, rank_of=lambda stage: 10 * stage, queue=queue)


@pytest.mark.parametrize(
    ("instruction", "queue", "expected"),
    [
        ("LoadMicroBatch", True, "waits for the data iterator"),
        ("RecvActivation", True, "waits for the activations of micro-batch 7 from stage 1 (rank 10)"),
        ("SendActivation", True, "waits for a free slot in its queue to stage 3 (rank 30)"),
        ("RefreshDecoders", True, "waits for copies of decoders for micro-batch 7 from stage 1 (rank 10)"),
        ("SendDecoders", True, "waits for a free slot in its queue of copies of decoders to stage 3 (rank 30)"),
        ("SendActivation", False, "waits for its activations of micro-batch 7 to be taken by stage 3 (rank 30)"),
        ("RecvGrad", False, "waits for the gradients of micro-batch 7 from stage 3 (rank 30)"),
        ("SendGrad", False, "waits for its gradients of micro-batch 7 to be taken by stage 1 (rank 10)"),
        ("ForwardPass", True, "computes"),
        ("BackwardPass", False, "computes"),
        ("OptimizerStep", True, "computes"),
        ("Barrier", True, "waits for all stages"),
        ("ReduceGrads", False, "waits for the ranks that hold the same weights"),
        (None, True, "is outside of train_batch()"),
        (None, False, "is outside of train_batch(), or at its end, between stages"),
    ],
)
def test_each_instruction_says_what_it_waits_for_and_from_whom(
    instruction: str | None, queue: bool, expected: str
) -> None:
    assert told(instruction, queue=queue) == expected


def test_every_instruction_of_every_schedule_that_waits_is_known() -> None:
    waiting = set()
    for schedules in (AL_SCHEDULES, BACKPROP_SCHEDULES):
        for schedule in schedules.values():
            for stage in range(3):
                for step in schedule(4, 3, stage).steps():
                    waiting |= {type(i).__name__ for i in step}
    split = {"BackwardInput", "BackwardWeight"}
    computing = {"ForwardPass", "BackwardPass", *split, "OptimizerStep"}
    assert {name for name in waiting if told(name) == "computes"} == computing
    assert all(hasattr(deepspeed_schedule, name) for name in waiting - split - {"Barrier"})


def looks(rule: Stillness, places: list[tuple[int, bool] | None], times: list[float]) -> list[float]:
    """At which of these times the rule tells of a stall."""
    return [now for now in times if rule.update(places, now) is not None]


def test_a_stall_is_told_once_and_again_at_doubling_distances() -> None:
    rule = Stillness(1.0)
    times = [k / 4 for k in range(4 * 20)]
    assert looks(rule, [(5, True), (3, True)], times) == [1.0, 3.0, 7.0, 15.0]


def test_one_moving_stage_is_enough() -> None:
    rule = Stillness(1.0)
    for step in range(40):
        assert rule.update([(5, True), (step // 3, True)], step / 4) is None


def test_after_a_move_all_starts_anew() -> None:
    rule = Stillness(1.0)
    assert looks(rule, [(5, True)], [0.0, 1.0]) == [1.0]
    assert looks(rule, [(6, True)], [2.0, 2.9, 3.0, 4.9, 5.0]) == [3.0, 5.0]


def test_time_outside_of_instructions_on_all_ranks_is_no_stall() -> None:
    rule = Stillness(1.0)
    assert looks(rule, [(5, False), (3, False)], [float(k) for k in range(10)]) == []
    # ... nor does it count towards one: the last look at it was at 9.
    assert looks(rule, [(5, True), (3, False)], [9.5, 9.9, 10.0]) == [10.0]


def test_what_is_not_heard_of_does_not_move() -> None:
    assert looks(Stillness(1.0), [None, (3, True)], [0.0, 0.5, 1.0]) == [1.0]


@pytest.mark.parametrize("seconds", [0, -1.0, float("inf"), float("nan")])
def test_the_config_refuses_lengths_that_mean_nothing(seconds: float) -> None:
    with pytest.raises(ValidationError, match="stall_seconds"):
        ALConfig(stall_seconds=seconds)


def test_the_watch_is_on_by_default_and_ends_the_job() -> None:
    assert ALConfig().stall_seconds == 1800 and ALConfig().on_stall == "end"
