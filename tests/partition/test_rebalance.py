"""When layers move by themselves: a stage that stays slower gives layers away and gets them back; noise moves none."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch

from ds_al.config.associated_learning import RepartitionConfig
from ds_al.launch.ranks import run_ranks
from ds_al.parallel.topology import StageTopology
from ds_al.partition.rebalance import Rebalance, layer_seconds
from ds_al.studies.bench.workloads import micro_batches, sleeping_engine
from ds_al.trace.events import Event
from ds_al.trace.recorder import Recording
from tests.support.engines import different, engine_state, merge


def rebalance(threshold: float = 1.2) -> Rebalance:
    return Rebalance(
        RepartitionConfig(every=1, threshold=threshold),
        topology=StageTopology(0, 0, 1, 0, 1, (0,), (0,)),
        device=torch.device("cpu"),
        recording=Recording(),
    )


def seconds(bounds: Sequence[int], slow: Sequence[float], *, noise: float = 0.0, seed: int = 0) -> list[float]:
    """Seconds of layers of 1 s each, on stages that are slower by these factors."""
    draw = random.Random(seed)
    stages = [stage for stage, (a, b) in enumerate(pairwise(bounds)) for _ in range(a, b)]
    return [slow[stage] * draw.uniform(1 - noise, 1 + noise) for stage in stages]


def test_a_stage_that_is_slower_gives_layers_away_at_the_second_check_and_gets_them_back() -> None:
    rule, even = rebalance(), [0, 4, 8, 12]
    assert rule.decide(seconds(even, [1, 1, 1]), even) is None
    assert rule.decide(seconds(even, [1, 2, 1]), even) is None  # it may be noise
    moved = rule.decide(seconds(even, [1, 2, 1]), even)
    assert moved == [0, 5, 7, 12]  # 5, 4 and 5 s instead of 4, 8 and 4
    assert all(rule.decide(seconds(moved, [1, 2, 1]), moved) is None for _ in range(4))
    assert rule.decide(seconds(moved, [1, 1, 1]), moved) is None
    assert rule.decide(seconds(moved, [1, 1, 1]), moved) == even


def test_noise_moves_no_layer() -> None:
    rule, even = rebalance(), [0, 2, 4]
    assert all(rule.decide(seconds(even, [1, 1], noise=0.05, seed=i), even) is None for i in range(200))


def test_one_slow_check_between_others_moves_no_layer() -> None:
    rule, even = rebalance(), [0, 4, 8]
    for _ in range(5):
        assert rule.decide(seconds(even, [1, 1]), even) is None
        assert rule.decide(seconds(even, [1, 3]), even) is None


def test_layers_that_were_cut_unevenly_are_balanced() -> None:
    rule, bounds = rebalance(), [0, 1, 8]
    assert rule.decide(seconds(bounds, [1, 1]), bounds) is None
    assert rule.decide(seconds(bounds, [1, 1]), bounds) == [0, 4, 8]


def test_seconds_of_layers_are_medians_and_steps_are_divided_by_weights() -> None:
    events = [
        *(Event(0, "ForwardPass", m, m, m + duration, layer=0) for m, duration in enumerate((0.1, 0.1, 0.9))),
        *(Event(0, "BackwardPass", m, m, m + 0.2, layer=1) for m in range(3)),
        *(Event(0, "OptimizerStep", m, m, m + 0.4) for m in range(3)),
        Event(0, "RecvActivation", 0, 0.0, 5.0),
    ]
    found = layer_seconds(events, micro_batches=3, weights={0: 30, 1: 10})
    assert found == pytest.approx({0: 0.1 + 0.3, 1: 0.2 + 0.1})


def slow_and_fast() -> list[tuple[list[int], dict[str, torch.Tensor]]]:
    """Worker: sleeping layers, three of four on the last stage, that stay and that move by themselves."""
    found = []
    for block in ({}, {"repartition": {"every": 1, "threshold": 1.1}}):
        engine = sleeping_engine("streaming", stages=2, layers=4, forward=0.01, backward=0.01, options=block)
        engine.repartition([0, 1, 4])
        engine.set_train_batch_size(2)
        data = micro_batches(engine)
        for _ in range(6):
            engine.train_batch(data)
        found.append((engine.module.bounds, engine_state(engine)))
    return found


@pytest.mark.distributed
def test_an_engine_moves_its_layers_by_itself_and_its_weights_stay_the_same() -> None:
    stay, move = zip(*run_ranks(f"{__name__}:slow_and_fast", 2), strict=True)
    assert [bounds for bounds, _ in stay] == [[0, 1, 4]] * 2
    assert [bounds for bounds, _ in move] == [[0, 2, 4]] * 2
    assert different(merge([state for _, state in stay]), merge([state for _, state in move])) == []
