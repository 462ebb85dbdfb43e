"""Whatever network, partition, schedule and batches are: the bits of the plain loop, and no message is lost.

Every rank draws the same examples, from one seed, and sees the results of all ranks, so that hypothesis looks for a
smaller failing example on all of them in step. ``pytest -m slow tests/test_properties.py`` draws more.
"""

from __future__ import annotations

import gc
import itertools
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from deepspeed.runtime import utils as ds_utils
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import nn

import ds_al
from ds_al.group_schedule import GROUP_SCHEDULES, Place
from ds_al.launch.ranks import run_ranks
from ds_al.planner import StageCost, simulate
from ds_al.schedule import AL_SCHEDULES
from tests.support import reference
from tests.support.engines import different, engine_state

INPUT, CLASSES, BASE_SEED = 5, 3, 11

# ---- training -----------------------------------------------------------------------------------------

BLOCKS: dict[str, Callable[[int, int], list[nn.Module]]] = {
    "linear": lambda one, two: [nn.Linear(one, two)],
    "tanh": lambda one, two: [nn.Linear(one, two), nn.Tanh()],
    "dropout": lambda one, two: [nn.Dropout(0.3), nn.Linear(one, two)],
    "batch norm": lambda one, two: [nn.Linear(one, two), nn.BatchNorm1d(two)],
    "layer norm": lambda one, two: [nn.LayerNorm(one), nn.Linear(one, two), nn.GELU()],
}
OPTIMIZERS: dict[str, tuple[dict[str, Any], reference.Maker]] = {
    "AdamW": ({"lr": 3e-3, "torch_adam": True}, partial(torch.optim.AdamW, lr=3e-3, fused=True)),
    "SGD": ({"lr": 0.05, "momentum": 0.9}, partial(torch.optim.SGD, lr=0.05, momentum=0.9, fused=True)),
}


def make_block(names: list[str], width_in: int, width_out: int) -> nn.Sequential:
    widths = [width_in, *[width_out] * len(names)]
    return nn.Sequential(
        *(part for n, (one, two) in zip(names, itertools.pairwise(widths), strict=True) for part in BLOCKS[n](one, two))
    )


@st.composite
def runs(draw: st.DrawFn, *, stages: int) -> dict[str, Any]:
    """Draws a network, its partitions one after the other, a config, and the sizes of micro-batches."""
    size = st.integers(2, 7)
    names = st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=2)
    layers = draw(st.lists(st.tuples(names, size, size), min_size=stages, max_size=stages + 3))
    bounds = st.sets(st.integers(1, len(layers) - 1), min_size=stages - 1, max_size=stages - 1).map(sorted)
    micro_batches = draw(st.integers(1, 5))
    steps = draw(st.sampled_from([n for n in range(1, micro_batches + 1) if micro_batches % n == 0]))
    batches = draw(st.integers(1, 3))
    return {
        "layers": layers,
        "cuts": draw(st.lists(bounds, min_size=batches, max_size=batches)),
        "micro_batches": micro_batches,
        "sizes": draw(st.lists(size, min_size=batches * micro_batches, max_size=batches * micro_batches)),
        "optimizer": draw(st.sampled_from(sorted(OPTIMIZERS))),
        "block": {
            "method": draw(st.sampled_from(sorted(AL_SCHEDULES))),
            "queue_depth": draw(st.integers(1, 4)),
            "receive_slots": draw(st.integers(2, 4)),
            "steps_per_batch": steps,
            "layer_gradient_clipping": draw(st.sampled_from([0.0, 0.1])),
            "message_checksum": draw(st.booleans()),
            "stall_seconds": None,
        },
    }


def specs_of(layers: list[tuple[list[str], int, int]]) -> list[ds_al.ALLayerSpec]:
    widths, codes = [INPUT, *(width for _, width, _ in layers)], [CLASSES, *(code for _, _, code in layers)]
    return [
        ds_al.ALLayerSpec(
            f=partial(make_block, names, widths[i], widths[i + 1]),
            b=partial(nn.Linear, widths[i + 1], codes[i + 1]),
            g=partial(nn.Linear, codes[i], codes[i + 1]),
            h=partial(nn.Linear, codes[i + 1], codes[i]),
        )
        for i, (names, _, _) in enumerate(layers)
    ]


def data_of(sizes: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(5)
    return [(torch.randn(n, INPUT, generator=draw), torch.randint(CLASSES, (n,), generator=draw)) for n in sizes]


def by_stages(run: dict[str, Any]) -> dict[str, torch.Tensor]:
    """State of all layers after training on the ranks, which move layers after every batch."""
    cuts = [f"cuts:{','.join(map(str, cut))}" for cut in run["cuts"]]
    module = ds_al.ALPipelineModule(
        specs_of(run["layers"]), num_classes=CLASSES, base_seed=BASE_SEED, partition_method=cuts[0], dynamic_shape=True
    )
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": run["micro_batches"],
        "optimizer": {"type": run["optimizer"], "params": OPTIMIZERS[run["optimizer"]][0]},
        "steps_per_print": None,
        "associated_learning": run["block"],
    }
    engine, *_ = ds_al.initialize(model=module, config=config)
    data = iter(data_of(run["sizes"]))
    for cut in cuts:
        engine.repartition(cut)
        engine.train_batch(data)
    states = engine.gather(engine_state(engine))
    engine.destroy()
    return {name: value for state in states for name, value in state.items()}


def by_the_loop(run: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The same by the plain loop, in this process."""
    layers = []
    for index, spec in enumerate(specs_of(run["layers"])):
        ds_utils.set_random_seed(BASE_SEED + index)
        layers.append(spec.build())
    optimizers = reference.train(
        layers,
        data_of(run["sizes"]),
        num_classes=CLASSES,
        make_optimizer=OPTIMIZERS[run["optimizer"]][1],
        base_seed=BASE_SEED,
        accumulate=run["micro_batches"] // run["block"]["steps_per_batch"],
        clip=run["block"]["layer_gradient_clipping"],
    )
    return reference.state(layers, optimizers)


def compared(stages: int, examples: int) -> int:
    """Worker: compares drawn runs with the loop; returns how many."""
    count = 0

    @seed(1)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(run=runs(stages=stages))
    def compare(run: dict[str, Any]) -> None:
        nonlocal count
        count += 1
        assert different(by_stages(run), by_the_loop(run)) == []
        gc.collect()

    compare()
    return count


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("stages", "examples"),
    [(3, 8), *(pytest.param(stages, 150, marks=pytest.mark.slow) for stages in (1, 2, 4))],
)
def test_drawn_runs_leave_the_bits_of_the_loop(stages: int, examples: int) -> None:
    counts = run_ranks(f"{__name__}:compared", stages, timeout=30 + 10 * examples, stages=stages, examples=examples)
    assert counts == [examples] * stages


# ---- messages -----------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    method=st.sampled_from(sorted(AL_SCHEDULES)),
    costs=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=9),
    micro_batches=st.integers(1, 9),
    batches=st.integers(1, 3),
    queue_depth=st.integers(1, 5),
    receive_slots=st.integers(2, 5),
)
def test_every_receive_has_its_send(
    method: str, costs: list[tuple[int, int]], micro_batches: int, batches: int, queue_depth: int, receive_slots: int
) -> None:
    """The simulator raises where stages wait for each other."""
    events = simulate(
        method,
        [StageCost(*cost) for cost in costs],
        micro_batches=micro_batches,
        batches=batches,
        queue_depth=queue_depth,
        receive_slots=receive_slots,
    )
    seen = Counter((event.stage, event.instruction) for event in events)
    for stage in range(len(costs)):
        for name, is_there in (("SendActivation", stage < len(costs) - 1), ("RecvActivation", stage > 0)):
            assert seen[stage, name] == batches * micro_batches * is_there, (stage, name)


@settings(max_examples=40)
@given(
    name=st.sampled_from(sorted(GROUP_SCHEDULES)),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    per_step=st.integers(1, 7),
    steps=st.integers(1, 3),
    batches=st.integers(1, 3),
    queue_depth=st.integers(1, 4),
    receive_slots=st.integers(2, 4),
    order=st.randoms(use_true_random=False),
)
def test_groups_of_any_sizes_pass_all_their_messages(
    name: str,
    sizes: list[int],
    per_step: int,
    steps: int,
    batches: int,
    queue_depth: int,
    receive_slots: int,
    order: Any,
) -> None:
    """Stages run in any order; a message waits for a free slot, and a slot for the end of its micro-batch."""
    stages = sum(sizes)
    places = [Place(0, 0, position, size) for size in sizes for position in range(size)]
    places = [place._replace(stage=stage, stages=stages) for stage, place in enumerate(places)]
    programs = []
    for place in places:
        schedule = GROUP_SCHEDULES[name](per_step * steps, place, steps)
        programs.append([type(one).__name__ for step in schedule.steps() for one in step] * batches)
    at, sent, taken, done = [0] * stages, Counter(), Counter(), Counter()
    slots = [max(queue_depth, 2 * a.size) + max(receive_slots, 2 * b.size) for a, b in itertools.pairwise(places)]

    def able(stage: int, one: str) -> bool:
        match one:
            case "SendActivation":
                return sent[stage, stage + 1] - done[stage + 1] < slots[stage]
            case "RecvActivation":
                return taken[stage - 1, stage] < sent[stage - 1, stage]
            case "SendGrad":
                return sent[stage, stage - 1] - taken[stage, stage - 1] < 4 * places[stage].size
            case "RecvGrad":
                return taken[stage + 1, stage] < sent[stage + 1, stage]
        return True

    def execute(stage: int, one: str) -> None:
        sent[stage, stage + 1] += one == "SendActivation"
        sent[stage, stage - 1] += one == "SendGrad"
        taken[stage - 1, stage] += one == "RecvActivation"
        taken[stage + 1, stage] += one == "RecvGrad"
        done[stage] += one in ("BackwardPass", "BackwardWeight")
        at[stage] += 1

    while unfinished := [stage for stage in range(stages) if at[stage] < len(programs[stage])]:
        ready = [stage for stage in unfinished if able(stage, programs[stage][at[stage]])]
        assert ready, f"the stages wait for each other: {[programs[s][at[s]] for s in unfinished]}"
        stage = order.choice(ready)
        execute(stage, programs[stage][at[stage]])
    assert sent == taken
    assert all(done[stage] == per_step * steps * batches for stage in range(stages))
