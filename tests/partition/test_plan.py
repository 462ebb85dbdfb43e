"""The cut with the smallest slowest stage, found exactly; and what layers cost, measured."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ds_al.errors import ALConfigError
from ds_al.layer import ALLayer
from ds_al.partition.layer_times import LayerTime, measure
from ds_al.partition.plan import balance, describe, explicit


def slowest(costs: list[list[float]], bounds: list[int]) -> float:
    return max(sum(costs[stage][a:b]) for stage, (a, b) in enumerate(itertools.pairwise(bounds)))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_other_cut_is_better(data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, 4))
    layers = data.draw(st.integers(stages, 7))
    row = st.lists(st.integers(1, 20).map(float), min_size=layers, max_size=layers)
    same = data.draw(st.booleans())
    costs = [data.draw(row)] * stages if same else [data.draw(row) for _ in range(stages)]
    bounds = balance(costs)
    every = [[0, *cuts, layers] for cuts in itertools.combinations(range(1, layers), stages - 1)]
    assert bounds in every
    assert slowest(costs, bounds) == min(slowest(costs, each) for each in every)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_other_cut_within_the_memory_is_better(data: st.DataObject) -> None:
    """Ranks of different speed, and each with a limit of its own, against all cuts."""
    stages = data.draw(st.integers(1, 4))
    layers = data.draw(st.integers(stages, 7))
    work = data.draw(st.lists(st.integers(1, 20), min_size=layers, max_size=layers))
    slowness = data.draw(st.lists(st.integers(1, 4), min_size=stages, max_size=stages))
    costs = [[float(slow * each) for each in work] for slow in slowness]
    memory = data.draw(st.lists(st.integers(0, 9).map(float), min_size=layers, max_size=layers))
    limits = data.draw(st.lists(st.integers(4, 20).map(float), min_size=stages, max_size=stages))
    every = [[0, *cuts, layers] for cuts in itertools.combinations(range(1, layers), stages - 1)]
    fitting = [
        bounds
        for bounds in every
        if all(sum(memory[a:b]) <= most for most, (a, b) in zip(limits, itertools.pairwise(bounds), strict=True))
    ]
    if not fitting:
        with pytest.raises(ALConfigError, match="no cut into"):
            balance(costs, memory=memory, limit=limits)
        return
    bounds = balance(costs, memory=memory, limit=limits)
    assert bounds in fitting
    assert slowest(costs, bounds) == min(slowest(costs, each) for each in fitting)


def test_a_memory_limit_is_kept_even_where_it_costs_time() -> None:
    costs = [[1.0, 1.0, 1.0, 9.0]] * 2
    assert balance(costs) == [0, 3, 4]
    assert balance(costs, memory=[4, 4, 4, 4], limit=8) == [0, 2, 4]
    with pytest.raises(ALConfigError, match=r"memory limit of 7: the cut that needs least, at layers \[2\], needs 8"):
        balance(costs, memory=[4, 4, 4, 4], limit=7)


def test_a_slow_rank_gets_less() -> None:
    assert balance([[2.0] * 6, [1.0] * 6]) == [0, 2, 6]


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ALConfigError, match="2 layers for 3 stages"):
        balance([[1.0, 1.0]] * 3)


def test_explicit_cuts() -> None:
    assert explicit("cuts:2,5", layers=7, stages=3) == [0, 2, 5, 7]
    assert explicit("cuts:", layers=3, stages=1) == [0, 3]


@pytest.mark.parametrize("text", ["cuts:2", "cuts:5,2", "cuts:0,3", "cuts:2,7", "cuts:a,b", "cuts:2,2"])
def test_cuts_that_make_no_stages_are_refused(text: str) -> None:
    with pytest.raises(ALConfigError, match="2 rising numbers between 0 and 7"):
        explicit(text, layers=7, stages=3)


class Sleeping(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.weight = seconds, nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return x * self.weight


@pytest.mark.alone
def test_layers_that_sleep_are_cut_by_how_long_they_sleep() -> None:
    seconds = [0.12, 0.03, 0.03, 0.03]

    def build(index: int) -> ALLayer:
        return ALLayer(Sleeping(seconds[index]), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))

    times = list(
        measure(build, layers=4, example=torch.ones(2, 4), num_classes=4, device=torch.device("cpu"), repeat=3)
    )
    for each, slept in zip(times, seconds, strict=True):
        assert each.forward >= slept and each.backward > 0 and each.step > 0
        assert each.cost(0.5) == each.forward + each.backward + each.step / 2
        parameters, steps, saved = (1 + 3 * 20) * 4, 4 * 7, 4 * (8 + 8 + 1)
        assert 4 * parameters + steps < each.memory < 4 * parameters + steps + 20 * saved
    assert balance([[each.cost() for each in times]] * 2) == [0, 1, 4]


def test_the_table_says_where_each_layer_goes_and_what_imbalance_is_left() -> None:
    times = [[LayerTime(0.001, 0.002, 0.001), LayerTime(0.002, 0.004, 0.002)]] * 2
    text = describe(times, [0, 1, 2], ["Conv", "Linear"])
    assert "Conv" in text and "the slowest stage takes 8.00 ms" in text and "50%, 0%" in text
    assert "speed of each rank, of the fastest: 1.00, 1.00" in text
    rarely = describe(times, [0, 1, 2], ["Conv", "Linear"], steps=0.25)
    assert "the slowest stage takes 6.50 ms" in rarely
    slow = describe([times[0], [LayerTime(0.004, 0.008, 0.004)] * 2], [0, 1, 2], ["Conv", "Linear"])
    assert "speed of each rank, of the fastest: 1.00, 0.38" in slow
