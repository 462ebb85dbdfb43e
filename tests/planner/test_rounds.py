"""The simulator for many stages gives the times of the one that follows each instruction, and takes seconds."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_al.baseline.schedules import BACKPROP_SCHEDULES
from ds_al.planner import StageCost, batch_ends, rounds, simulate
from ds_al.planner.rounds import stage_ends
from ds_al.schedule import AL_SCHEDULES
from ds_al.trace.analysis import computing

times = st.integers(0, 5)
cost = st.builds(StageCost, st.integers(1, 5), st.integers(1, 5), times)


@pytest.mark.parametrize("method", [*AL_SCHEDULES, *BACKPROP_SCHEDULES])
@settings(max_examples=40, deadline=None)
@given(
    costs=st.lists(cost, min_size=1, max_size=6),
    micro_batches=st.integers(1, 7),
    batches=st.integers(1, 3),
    queue_depth=st.integers(1, 4),
    latency=times,
    transfer=times,
)
def test_both_simulators_agree(
    method: str, costs: list[StageCost], micro_batches: int, batches: int, queue_depth: int, latency: int, transfer: int
) -> None:
    options = {
        "micro_batches": micro_batches, "queue_depth": queue_depth,
        "latency": float(latency), "transfer": float(transfer),
    }  # fmt: skip
    ends = stage_ends(method, costs, batches=batches, **options)
    assert ends.shape == (len(costs), batches, 1)
    for count in range(1, batches + 1):
        events = computing(simulate(method, costs, batches=count, **options))
        for stage in range(len(costs)):
            last = max(event.end for event in events if event.stage == stage)
            assert ends[stage, count - 1, 0] == pytest.approx(last)


def test_repetitions_are_runs_of_their_own() -> None:
    factors = np.random.default_rng(0).uniform(0.5, 3.0, size=(3, 10, 4))
    costs = [StageCost(1, 2, 0.5)] * 3
    both = batch_ends("streaming", costs, micro_batches=5, batches=2, factors=factors)
    for r in range(4):
        one = batch_ends("streaming", costs, micro_batches=5, batches=2, factors=factors[:, :, r : r + 1])
        assert np.array_equal(one[:, 0], both[:, r])
    assert len(set(both[-1])) == 4


def test_each_link_has_its_own_rate_and_latency() -> None:
    costs = [StageCost(1, 1)] * 3
    slow_first = batch_ends("streaming", costs, micro_batches=6, batches=1, transfer=[9.0, 0.0], latency=[0.0, 4.0])
    assert slow_first[-1, 0] == pytest.approx(1 + 6 * 9 + 1 + 4 + 2)  # the first link sets the pace
    with pytest.raises(ValueError, match="could not broadcast"):
        batch_ends("streaming", costs, micro_batches=6, batches=1, transfer=[9.0, 0.0, 0.0])


def test_a_thousand_stages_keep_the_formula() -> None:
    ends = batch_ends("streaming", [StageCost(1, 2)] * 1024, micro_batches=16, batches=2)
    assert ends[-1, 0] == 2 * 16 * 3 + 1023
    assert ends[0, 0] == 16 * 3 + 1023


@pytest.fixture
def forgetful() -> Iterator[None]:
    """Programs are kept from call to call: not those of this test."""
    rounds._program.cache_clear()
    yield
    rounds._program.cache_clear()


@pytest.mark.usefixtures("forgetful")
def test_schedules_that_wait_for_each_other_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [["RecvGrad", "ForwardPass"], ["RecvActivation", "ForwardPass"]]
    monkeypatch.setattr(rounds, "instruction_names", lambda method, m, stages, stage, *rest: names[stage])
    with pytest.raises(RuntimeError, match="wait for each other"):
        batch_ends("bp_naive", [StageCost(1, 1)] * 2, micro_batches=1, batches=1)
