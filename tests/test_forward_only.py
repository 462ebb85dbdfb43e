"""Promise 2: in streaming training every message goes from a stage to the next one, and nothing else is said.

And every message, of whatever kind, goes through the process group of a border, of two ranks alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist

import ds_al
from ds_al.launch.ranks import run_ranks
from ds_al.models import build_al
from ds_al.transport.channel import Receiver, Sender
from tests.group.networks import network
from tests.support.engines import MICRO_BATCHES, SEED, engine_config, make_engine
from tests.support.networks import NETWORKS

pytestmark = pytest.mark.distributed

TRANSFERS = ("send", "isend", "recv", "irecv", "batch_isend_irecv")
COLLECTIVES = (
    "barrier", "monitored_barrier", "broadcast", "broadcast_object_list", "all_reduce", "reduce", "all_gather",
    "all_gather_into_tensor", "all_gather_object", "gather", "gather_object", "scatter", "reduce_scatter",
    "reduce_scatter_tensor", "all_to_all", "all_to_all_single", "new_group",
)  # fmt: skip
BATCHES = 6

Call = tuple[str, str, int | None]
"""Operation, kind of message, and the rank at the other end; the kind is ``""`` where no border's group is used."""


def channels(engine: ds_al.ALPipelineEngine) -> dict[str, list[Sender | Receiver]]:
    """The channels of a stage by the kind of their messages."""
    kinds = {name: getattr(engine.links, name) for name in ("training", "decoders", "evaluation", "gradients")}
    return {name: [end for end in ends if end is not None] for name, ends in kinds.items()}


@contextmanager
def probe(engine: ds_al.ALPipelineEngine) -> Iterator[list[Call]]:
    """Lists every communication call of this rank."""
    calls: list[Call] = []
    ranks = engine.topology.pipeline
    borders = {end._group: (kind, ranks[end.there]) for kind, ends in channels(engine).items() for end in ends}

    def watched(operation: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watch(*args: Any, **kwargs: Any) -> Any:
            group = args[0] if args and isinstance(args[0], torch_dist.ProcessGroupGloo) else None
            calls.append((operation, *borders.get(group, ("", None))))
            return call(*args, **kwargs)

        return watch

    with pytest.MonkeyPatch.context() as patch:
        for name in (*TRANSFERS, *COLLECTIVES):
            patch.setattr(torch_dist, name, watched(name, getattr(torch_dist, name)))
        for kind in (torch_dist.ProcessGroup, torch_dist.ProcessGroupGloo):  # what the functions above would end in
            for name in ("send", "recv"):
                patch.setattr(kind, name, watched(name, getattr(kind, name)))
        yield calls


def trained(method: str, options: dict[str, Any]) -> list[Call]:
    """Worker: every communication call of training."""
    engine = make_engine("mlp", method=method, **options)
    batches = iter(NETWORKS["mlp"].batches(BATCHES * MICRO_BATCHES))
    with probe(engine) as calls:
        for _ in range(BATCHES):
            engine.train_batch(batches)
        found = list(calls)
        engine.flush()
    return found


def backward_or_collective(ranks: list[list[Call]]) -> list[tuple[int, Call]]:
    """Calls that are no send to the next rank and no receive from the previous one."""
    return [
        (rank, call)
        for rank, calls in enumerate(ranks)
        for call in calls
        if call not in {("send", "training", rank + 1), ("recv", "training", rank - 1)}
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"layer_gradient_clipping": 0.1, "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}},
        {"steps_per_batch": 1, "queue_depth": 1, "module_options": {"dynamic_shape": True}},
    ],
    ids=["clipping and scheduler", "accumulation, dynamic shapes"],
)
def test_streaming_only_ever_sends_forward(options: dict[str, Any]) -> None:
    ranks = run_ranks(f"{__name__}:trained", 3, method="streaming", options=options)
    assert not backward_or_collective(ranks)
    headers = BATCHES * MICRO_BATCHES if "module_options" in options else 1
    sends = BATCHES * MICRO_BATCHES + headers
    assert [sum(name == "send" for name, *_ in calls) for calls in ranks] == [sends, sends, 0]
    assert [sum(name == "recv" for name, *_ in calls) for calls in ranks] == [0, sends, sends]


def test_the_probe_sees_the_barrier_of_forward_first() -> None:
    ranks = run_ranks(f"{__name__}:trained", 3, method="forward_first", options={})
    found = backward_or_collective(ranks)
    assert {call for _, call in found} == {("barrier", "", None)}
    assert len(found) == 3 * BATCHES


def trained_in_groups(schedule: str, cuts: str) -> list[Call]:
    """Worker: every communication call of the training of two layers on four stages."""
    net = network("mlp", 2)
    module = ds_al.ALPipelineModule(net.layers(), num_classes=4, base_seed=SEED, partition_method=cuts)
    engine, *_ = ds_al.initialize(model=module, config=engine_config(group_schedule=schedule, steps_per_batch=1))
    batches = iter(net.batches(BATCHES * MICRO_BATCHES))
    with probe(engine) as calls:
        for _ in range(BATCHES):
            engine.train_batch(batches)
        found = list(calls)
        engine.flush()
    return found


@pytest.mark.parametrize(
    ("schedule", "cuts", "group_of"), [("1f1b", "cuts:1,2,4", (0, 0, 0, 1)), ("zb_h2", "uniform", (0, 0, 1, 1))]
)
def test_nothing_is_said_to_an_earlier_group(schedule: str, cuts: str, group_of: tuple[int, ...]) -> None:
    """Gradients go to the previous stage of the same group: no other message, barrier or collective."""
    ranks = run_ranks(f"{__name__}:trained_in_groups", 4, schedule=schedule, cuts=cuts)
    inside = [stage for stage in range(1, 4) if group_of[stage] == group_of[stage - 1]]
    expected = {(stage, ("send", "gradients", stage - 1)) for stage in inside}
    expected |= {(stage - 1, ("recv", "gradients", stage)) for stage in inside}
    assert set(backward_or_collective(ranks)) == expected
    sends = BATCHES * MICRO_BATCHES + 1  # and a header
    for stage, calls in enumerate(ranks):
        assert calls.count(("send", "training", stage + 1)) == (sends if stage < 3 else 0)
        assert calls.count(("send", "gradients", stage - 1)) == (sends if stage in inside else 0)


def everything(folder: str) -> tuple[Counter[Call], list[tuple[str, int, int]]]:
    """Worker: transfers of all that an engine does, and what each channel counted: kind, other end, messages."""
    layers = build_al(
        "transformer", vocab_size=20, num_classes=4, width=8, heads=2, feed_forward=12, max_length=7, code_width=6,
        objective="decoded",
    )  # fmt: skip
    module = ds_al.ALPipelineModule(layers, num_classes=4, base_seed=SEED, num_stages=3)
    engine, *_ = ds_al.initialize(model=module, config=engine_config())
    data = NETWORKS["transformer"]
    with probe(engine) as calls:
        engine.train_batch(iter(data.batches(MICRO_BATCHES)))
        engine.evaluate(data.batches(2))
        engine.predict(data.batches(1)[0][0])
        engine.gather_losses()
        engine.save_checkpoint(folder)
        engine.load_checkpoint(folder)
        engine.reset_activation_shape()
        engine.train_batch(iter(data.batches(MICRO_BATCHES)))
        engine.flush()
    ranks = engine.topology.pipeline
    counted = [(kind, ranks[end.there], end.messages) for kind, ends in channels(engine).items() for end in ends]
    return Counter(call for call in calls if call[0] not in COLLECTIVES), counted


def test_every_message_goes_through_the_group_of_its_border(tmp_path: Path) -> None:
    """Two replicas of three stages. Shapes are announced anew after a reset, and in evaluation with every message."""
    ranks = run_ranks(f"{__name__}:everything", 6, folder=str(tmp_path))
    for rank, (calls, counted) in enumerate(ranks):
        before, after = rank - 2, rank + 2
        expected = Counter()
        for kind, peer, messages in counted:
            assert peer in (before, after) and messages
            headers = {"training": 2, "decoders": 1, "evaluation": messages}[kind]
            expected["send" if peer == after else "recv", kind, peer] = messages + headers
        assert calls == expected
        assert {call[1] for call in calls} == {"training", "decoders", "evaluation"}


def on_all_ranks() -> list[Call]:
    """Worker: a message that goes past the groups of borders."""
    engine = make_engine("mlp")
    rank = torch_dist.get_rank()
    with probe(engine) as calls:
        (torch_dist.recv if rank else torch_dist.send)(torch.ones(1), 1 - rank)
    return calls


def test_the_probe_sees_a_message_on_the_group_of_all_ranks() -> None:
    assert run_ranks(f"{__name__}:on_all_ranks", 2) == [[("send", "", None)] * 2, [("recv", "", None)] * 2]
