"""The oracle where layers span stages: K, P, M and the schedule leave the bits of one process over whole layers."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch

import ds_al
from ds_al.launch.ranks import run_ranks
from ds_al.partition.part import blocks
from tests.group.networks import NAMES, Layers, network
from tests.support import reference
from tests.support.engines import SEED, State, different, engine_config, engine_state, merge

pytestmark = pytest.mark.distributed

BATCHES = 2
ENGINES = 10
"""Cases that one process trains: each engine has process groups of its own, whose threads live as long as it."""
SCHEDULES = ("1f1b", "zb_h1", "zb_h2")


class Case(NamedTuple):
    """A network of K layers (or of layers with these numbers of blocks) that steps after M micro-batches."""

    network: str
    layers: Layers
    micro_batches: int
    schedule: str
    partition: str = "uniform"


def trained(cases: list[Case]) -> list[State]:
    """Worker: trains case after case; the state of this stage."""
    states = []
    for case in cases:
        net = network(case.network, case.layers)
        module = ds_al.ALPipelineModule(
            net.layers(),
            num_classes=net.classes,
            base_seed=SEED,
            partition_method=case.partition,
            activation_checkpoint_interval=int(case.network == "recomputed"),
        )
        config = engine_config(
            micro_batches=case.micro_batches,
            group_schedule=case.schedule,
            steps_per_batch=1,
            unused_parameters="allow",  # experts
        )
        engine, *_ = ds_al.initialize(model=module, config=config)
        batches = iter(net.batches(BATCHES * case.micro_batches))
        for _ in range(BATCHES):
            engine.train_batch(batches)
        engine.flush()
        states.append(engine_state(engine))
    return states


@functools.cache
def expected(name: str, layers: Layers, micro_batches: int) -> State:
    """The state after the plain loop over whole layers, with accumulation in the order of micro-batches."""
    net = network(name, layers)
    whole = net.build(SEED)
    optimizers = reference.train(
        whole,
        net.batches(BATCHES * micro_batches),
        num_classes=net.classes,
        make_optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, fused=True),
        base_seed=SEED,
        accumulate=micro_batches,
    )
    return reference.state(whole, optimizers)


def check(stages: int, cases: list[Case]) -> None:
    wrong = {}
    for own in (cases[start : start + ENGINES] for start in range(0, len(cases), ENGINES)):
        ranks = run_ranks(f"{__name__}:trained", stages, cases=own, timeout=1800)
        for number, case in enumerate(own):
            names = different(merge([rank[number] for rank in ranks]), expected(*case[:3]))
            if names:
                wrong[case] = names
    assert not wrong


COVERING = {
    1: [Case("transformer", 2, 4, "zb_h2"), Case("users", 4, 4, "1f1b")],
    2: [
        *(Case(name, 1, 4, schedule) for name, schedule in zip(NAMES, itertools.cycle(SCHEDULES))),
        Case("users", 1, 8, "zb_h1"),
        Case("mlp", 1, 1, "zb_h2", "cuts:7"),
        Case("mlp", 1, 4, "auto"),
    ],
    3: [
        *(Case(name, 2, 4, schedule) for name, schedule in zip(NAMES, itertools.cycle(SCHEDULES[::-1]))),
        Case("transformer", (5, 3), 8, "zb_h1", "cuts:1,5"),
        Case("mlp", 1, 8, "1f1b", "cuts:1,6"),
    ],
    4: [
        *(Case(name, 1, 8, schedule) for name, schedule in zip(NAMES[1:], itertools.cycle(SCHEDULES))),
        Case("transformer", (2, 6), 4, "zb_h2", "cuts:2,4,7"),  # a group of one stage before one of three
        Case("users", (6, 2), 4, "zb_h2", "cuts:1,3,6"),
        Case("lstm", 4, 4, "zb_h1"),
    ],
    8: [
        Case("mlp", 1, 8, "1f1b"),
        Case("transformer", 2, 8, "zb_h2"),
        Case("users", 4, 4, "zb_h1"),
        Case("vgg", 1, 8, "zb_h2"),
        Case("vgg", 4, 1, "1f1b"),  # cut between maps of a single pixel
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    "stages", [pytest.param(stages, marks=pytest.mark.slow if stages == 8 else ()) for stages in COVERING]
)
def test_groups_leave_the_bits_of_one_process(stages: int) -> None:
    check(stages, COVERING[stages])


UNEVEN: dict[tuple[int, int], tuple[Layers, tuple[int, ...]]] = {
    (1, 2): ((8,), (2,)),
    (1, 3): ((8,), (3,)),
    (1, 4): ((8,), (4,)),
    (2, 3): ((6, 2), (2, 1)),
    (2, 4): ((2, 6), (1, 3)),
    (2, 8): ((2, 6), (2, 6)),
    (4, 8): ((1, 3, 1, 3), (1, 3, 1, 3)),
}
"""By K and P, blocks of each layer and stages of each group, as uneven as possible."""


def uneven(name: str, layers: Layers, groups: Sequence[int]) -> str:
    """The partition whose stages hold one block each, but for the last one of each group."""
    counts = [blocks(layer.f) for layer in network(name, layers).build(SEED)]
    starts = [sum(counts[:i]) + j for i, size in enumerate(groups) for j in range(size)]
    return "cuts:" + ",".join(map(str, starts[1:]))


def partitions(name: str, layers: int, stages: int) -> list[tuple[Layers, str]]:
    if (layers, stages) not in UNEVEN:
        return [(layers, "uniform")]
    sizes, groups = UNEVEN[layers, stages]
    return [(layers, "uniform"), (sizes, uneven(name, sizes, groups))]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stages", [1, 2, 3, 4, 8])
def test_full_matrix(name: str, stages: int) -> None:
    cases = [
        Case(name, layers, micro_batches, schedule, partition)
        for count, micro_batches in itertools.product((1, 2, 4), (1, 4, 8))
        for layers, partition in partitions(name, count, stages)
        for schedule in (SCHEDULES if count < stages else SCHEDULES[:1])
    ]
    check(stages, cases)
