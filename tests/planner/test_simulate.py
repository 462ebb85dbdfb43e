"""The simulator runs the schedules' own instructions: its times are the formulas', wherever there is a formula."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_al.baseline.schedules import BACKPROP_SCHEDULES
from ds_al.planner import StageCost, simulate, simulator
from ds_al.schedule import AL_SCHEDULES, bubble_formula, ideal_seconds
from ds_al.trace.analysis import critical_path, idle_share, span, stage_times

METHODS = [*AL_SCHEDULES, *BACKPROP_SCHEDULES]


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
    sizes = {"stages": stages, "micro_batches": micro_batches, "batches": batches}
    times = {"forward": float(forward), "backward": float(backward)}
    events = simulate(method, [StageCost(forward, backward)] * stages, micro_batches=micro_batches, batches=batches)
    start, end = span(events)
    assert end - start == pytest.approx(ideal_seconds(method, **sizes, **times))
    assert idle_share(events) == pytest.approx(bubble_formula(method, **sizes, **times), abs=1e-9)


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


def test_schedules_that_wait_for_each_other_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [["RecvGrad"], ["RecvActivation"]]
    monkeypatch.setattr(simulator, "instruction_names", lambda method, m, stages, stage, *rest: names[stage])
    with pytest.raises(RuntimeError, match="wait for each other: stage 0 in RecvGrad, stage 1 in RecvActivation"):
        simulate("bp_naive", [StageCost(1, 1)] * 2, micro_batches=1, batches=1)
