"""The simulator runs the schedules' own instructions: its times are those of the formulas, wherever there is one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_al.baseline.schedules import BACKPROP_SCHEDULES
from ds_al.group_schedule import GROUP_SCHEDULES, group_seconds
from ds_al.planner import StageCost, bubble_formula, ideal_seconds, simulate, simulator, stage_ends
from ds_al.schedule import AL_SCHEDULES
from ds_al.trace.analysis import computing, critical_path, idle_share, span, stage_times

METHODS = [*AL_SCHEDULES, *BACKPROP_SCHEDULES]
UNEQUAL = [StageCost(2, 3, 1), StageCost(1, 5), StageCost(4, 2, 2), StageCost(1, 1)]


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=25, deadline=None)
@given(
    stages=st.integers(1, 6),
    micro_batches=st.integers(1, 9),
    batches=st.integers(1, 3),
    forward=st.integers(1, 5),
    backward=st.integers(1, 5),
)
def test_equal_stages_take_the_time_of_the_formula(
    method: str, stages: int, micro_batches: int, batches: int, forward: int, backward: int
) -> None:
    if method.startswith("bp_zb"):  # whose formulas are for equal times of F, I and W
        backward = 2 * forward
    sizes = {"stages": stages, "micro_batches": micro_batches, "batches": batches}
    times = {"forward": float(forward), "backward": float(backward)}
    events = simulate(method, [StageCost(forward, backward)] * stages, micro_batches=micro_batches, batches=batches)
    start, end = span(events)
    assert end - start == pytest.approx(ideal_seconds(method, **sizes, **times))
    assert idle_share(events) == pytest.approx(bubble_formula(method, **sizes, **times), abs=1e-9)


@pytest.mark.parametrize("schedule", GROUP_SCHEDULES)
@pytest.mark.parametrize("groups", [(2,), (4,), (2, 2), (4, 4), (2, 2, 2, 2), (8,)])
@pytest.mark.parametrize("micro_batches", [1, 4, 16])
def test_a_group_keeps_its_period_in_a_chain_of_groups(
    schedule: str, groups: tuple[int, ...], micro_batches: int
) -> None:
    """Exactly that of the formula, with a step that takes time; no group waits for a later one."""
    costs = [StageCost(1, 2, 0.3)] * sum(groups)
    ends = stage_ends(schedule, costs, micro_batches=micro_batches, batches=6, groups=groups)[..., 0]
    formula = group_seconds(schedule, size=groups[0], micro_batches=micro_batches, forward=1, halves=(1, 1), step=0.3)
    assert ends.max(axis=0)[-1] - ends.max(axis=0)[-2] == pytest.approx(formula)
    if len(groups) == 1 and schedule != "1f1b":
        alone = stage_ends(f"bp_{schedule}", costs, micro_batches=micro_batches, batches=6)[..., 0]
        assert (alone == ends).all()


def test_the_largest_of_uneven_groups_sets_the_pace() -> None:
    costs = [StageCost(1, 2)] * 4
    ends = stage_ends("1f1b", costs, micro_batches=4, batches=6, groups=(1, 3))[..., 0]
    assert ends.max(axis=0)[-1] - ends.max(axis=0)[-2] == (4 + 3 - 1) * 3


def test_gradients_take_their_time_inside_a_group_and_not_between_groups() -> None:
    """A micro-batch at a time: a message there and one back in each period of a group of two, nothing without one."""
    costs, size = [StageCost(1, 2)] * 4, {"micro_batches": 1, "batches": 6, "latency": 0.5}
    inside, between = (
        stage_ends("1f1b", costs, **size, groups=groups)[..., 0].max(axis=0) for groups in ((2, 2), (1, 1, 1, 1))
    )
    assert inside[-1] - inside[-2] == 2 * 3 + 2 * 0.5 and between[-1] - between[-2] == 3


def test_streaming_goes_at_the_pace_of_its_slowest_stage() -> None:
    costs = [StageCost(1, 1), StageCost(3, 4), StageCost(1, 1)]
    events = simulate("streaming", costs, micro_batches=10, batches=2)
    first, slow, _ = stage_times(events)
    assert slow.span == 1 + 20 * 7  # until its first input is there, and then without a pause
    assert slow.busy == pytest.approx(140 / 141)
    assert first.wait_queue > 0.5  # it is ahead as far as the queue allows, no further
    shares = [sum(e.seconds for e in critical_path(events) if e.stage == stage) for stage in range(3)]
    assert shares[1] > 0.9 * sum(shares)


def test_a_deeper_queue_lets_a_stage_run_further_ahead() -> None:
    costs = [StageCost(1, 1), StageCost(3, 3)]

    def ends(depth: int) -> float:
        events = simulate("streaming", costs, micro_batches=20, batches=1, queue_depth=depth)
        return max(event.end for event in events if event.stage == 0)

    assert ends(1) > ends(2) > ends(8)


def test_steps_and_messages_take_their_time() -> None:
    costs = [StageCost(1, 1, 0.5)] * 2
    events = simulate("streaming", costs, micro_batches=4, batches=1, latency=0.25)
    start, end = span(events)
    assert end - start == pytest.approx(1 + 0.25 + 4 * 2.5)
    once = simulate("streaming", costs, micro_batches=4, batches=1, steps_per_batch=1)
    assert sum(event.instruction == "OptimizerStep" for event in once) == 2


def test_a_slow_link_hides_behind_computation_as_long_as_it_keeps_up() -> None:
    costs = [StageCost(1, 1)] * 2

    def seconds(method: str, transfer: float) -> float:
        start, end = span(simulate(method, costs, micro_batches=10, batches=1, transfer=transfer))
        return end - start

    assert seconds("streaming", 1.5) == pytest.approx(seconds("streaming", 0.0) + 1.5)  # once, while it fills
    assert seconds("streaming", 4.0) == pytest.approx(1 + 10 * 4.0 + 2)  # the link sets the pace
    assert seconds("bp_1f1b", 1.5) > seconds("bp_1f1b", 0.0) + 10 * 1.5  # a send blocks, and comes back as a gradient


def test_back_propagation_waits_for_gradients_and_streaming_does_not() -> None:
    costs = [StageCost(1, 1)] * 3
    bp = simulate("bp_1f1b", costs, micro_batches=3, batches=1)
    al = simulate("streaming", costs, micro_batches=3, batches=1)
    assert stage_times(bp)[0].wait_input > 0.3
    assert stage_times(al)[0].wait_input == 0


@pytest.mark.parametrize(
    ("method", "free", "slow"),
    [
        ("streaming", [60, 62, 83, 81], [60, 72, 93, 96]),
        ("forward_first", [73, 75, 86, 84], [86, 93, 109, 112]),
        ("parallel_backward", [120, 121, 120, 117], [270, 271, 270, 267]),
        ("sequential", [218, 218, 220, 220], [368, 368, 370, 370]),
        ("bp_1f1b", [90, 86, 80, 76], [232, 225, 217, 208]),
        ("bp_gpipe", [112, 108, 93, 85], [204, 197, 177, 164]),
        ("bp_naive", [192, 188, 185, 181], [492, 485, 477, 468]),
    ],
)
def test_unequal_stages_end_when_each_instruction_followed_by_hand_does(
    method: str, free: list[float], slow: list[float]
) -> None:
    """Two batches of five micro-batches; where messages take time, one slot in the queue."""
    size = {"micro_batches": 5, "batches": 2}
    assert stage_ends(method, UNEQUAL, **size)[:, -1, 0].tolist() == free
    late = {"queue_depth": 1, "latency": 3.0, "transfer": 2.0}
    assert stage_ends(method, UNEQUAL, **size, **late)[:, -1, 0].tolist() == slow


@pytest.mark.parametrize("method", METHODS)
def test_events_end_when_the_batches_do(method: str) -> None:
    options = {"micro_batches": 3, "latency": 0.5, "transfer": 1.5}
    ends = stage_ends(method, UNEQUAL, batches=3, **options)
    assert ends.shape == (4, 3, 1)
    for count in (1, 2, 3):
        events = computing(simulate(method, UNEQUAL, batches=count, **options))
        last = [max(event.end for event in events if event.stage == stage) for stage in range(4)]
        assert ends[:, count - 1, 0].tolist() == last


def test_more_receive_slots_let_a_stage_run_further_ahead() -> None:
    costs = [StageCost(1, 1), StageCost(3, 3)]
    size = {"micro_batches": 20, "batches": 1}
    ends = [stage_ends("streaming", costs, **size, receive_slots=slots)[:, -1, 0] for slots in (2, 3, 8)]
    assert ends[0][0] > ends[1][0] > ends[2][0]
    assert ends[0][1] == ends[1][1] == ends[2][1]  # the slow stage is as late as before
    deeper = stage_ends("streaming", costs, **size, queue_depth=3)[:, -1, 0]
    assert np.array_equal(ends[1], deeper)  # a message waits in one place or in the other


def test_repetitions_are_runs_of_their_own() -> None:
    factors = np.random.default_rng(0).uniform(0.5, 3.0, size=(3, 10, 4))
    costs = [StageCost(1, 2, 0.5)] * 3
    all_of_them = stage_ends("streaming", costs, micro_batches=5, batches=2, factors=factors)
    for r in range(4):
        one = stage_ends("streaming", costs, micro_batches=5, batches=2, factors=factors[:, :, r : r + 1])
        assert np.array_equal(one[..., 0], all_of_them[..., r])
    assert len(set(all_of_them[0, -1])) == 4


def test_each_link_has_its_own_rate_and_latency() -> None:
    costs = [StageCost(1, 1)] * 3
    size = {"micro_batches": 6, "batches": 1}
    slow_first = stage_ends("streaming", costs, **size, transfer=[9.0, 0.0], latency=[0.0, 4.0])
    assert slow_first.max() == pytest.approx(1 + 6 * 9 + 1 + 4 + 2)  # the first link sets the pace
    with pytest.raises(ValueError, match="could not broadcast"):
        stage_ends("streaming", costs, **size, transfer=[9.0, 0.0, 0.0])


def test_a_thousand_stages_keep_the_formula() -> None:
    ends = stage_ends("streaming", [StageCost(1, 2)] * 1024, micro_batches=16, batches=2).max(axis=0)
    assert ends[:, 0].tolist() == [16 * 3 + 1023, 2 * 16 * 3 + 1023]


@pytest.fixture
def forgetful() -> Iterator[None]:
    """Programs are kept from call to call: not those of this test."""
    simulator._program.cache_clear()
    yield
    simulator._program.cache_clear()


@pytest.mark.usefixtures("forgetful")
def test_schedules_that_wait_for_each_other_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [["RecvGrad"], ["RecvActivation"]]
    monkeypatch.setattr(simulator, "instruction_names", lambda method, m, stages, stage, *rest: names[stage])
    with pytest.raises(RuntimeError, match="wait for each other: stage 0 in RecvGrad, stage 1 in RecvActivation"):
        simulate("bp_naive", [StageCost(1, 1)] * 2, micro_batches=1, batches=1)
