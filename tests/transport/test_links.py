"""Encoded messages and slow links between real ranks, all in one set of three.

With ``bf16`` and ``int8`` exactness means: for a given partition, the same bits for every schedule and queue depth.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from deepspeed.pipe import PipelineModule
from torch import Tensor, nn

import ds_al
from ds_al.baseline import engine as backprop
from ds_al.config.associated_learning import LinkConfig
from ds_al.launch.ranks import run_ranks
from ds_al.layer import predict
from ds_al.models import build_al, build_twin
from ds_al.parallel.pairs import pair
from ds_al.schedule import AL_SCHEDULES
from ds_al.studies.bench.traffic import measure_traffic
from ds_al.transport import slow_link as link
from ds_al.transport.compression import COMPRESSIONS
from ds_al.transport.slow_link import SlowReceiver, SlowSender, wait_until
from tests.support.engines import MICRO_BATCHES, SEED, State, different, engine_config, engine_state, merge
from tests.support.networks import NETWORKS, Network

pytestmark = [pytest.mark.distributed, pytest.mark.alone]

STAGES, DELAY_MS = 3, 300.0
TEXT: dict[str, Any] = {
    "vocab_size": 20, "num_classes": 4, "width": 8, "heads": 2, "feed_forward": 12, "dropout": 0.2, "max_length": 7,
}  # fmt: skip
CONTRAST = Network(
    lambda: build_al("transformer", **TEXT, code_width=6, objective="contrast"), NETWORKS["transformer"].make_input
)
OTHERS = [method for method in AL_SCHEDULES if method != "streaming"]
CASES: list[dict[str, Any]] = [
    {"method": method, "queue_depth": depth, "message_dtype": message_dtype}
    for message_dtype in ("bf16", "int8")
    for method, depth in [("streaming", 1), ("streaming", 4), *zip(OTHERS, (4, 1, 4), strict=True)]
]
EXACT = {"method": "streaming"}
SLOW = {"method": "streaming", "link": {"delay_ms": 5, "mbit": 10}}
TWIN = {"method": "bp_1f1b"}
SLOW_TWIN = {**TWIN, "link": {"delay_ms": 20}}


def worker() -> dict[str, Any]:
    """All that one rank does."""
    return {
        "trained": [al_state(case) for case in [*CASES, EXACT, SLOW]],
        "twins": [twin_state(case) for case in (TWIN, SLOW_TWIN)],
        "delay": channel(LinkConfig(delay_ms=DELAY_MS)),
        "speed": channel(LinkConfig(mbit=0.01)),
    }


def al_state(case: dict[str, Any]) -> tuple[State, Tensor, list[float]]:
    """Weights after two batches, scores of the last layer, and how late messages were taken in."""
    late = watch(link)
    module = ds_al.ALPipelineModule(CONTRAST.layers(), num_classes=4, base_seed=SEED)
    engine, *_ = ds_al.initialize(model=module, config=engine_config(**case))
    batches = iter(CONTRAST.batches(2 * MICRO_BATCHES))
    for _ in range(2):
        engine.train_batch(batches)
    scores = engine.predict(CONTRAST.batches(1, seed=1)[0][0] if engine.is_first_stage() else None)
    return engine_state(engine), scores, late


def twin_state(case: dict[str, Any]) -> tuple[State, float, list[float]]:
    """Weights of the backprop twin after two batches, the seconds they took, and how late messages were taken in."""
    late = watch(backprop)
    module = PipelineModule(
        build_twin("transformer", **TEXT),
        num_stages=STAGES,
        loss_fn=nn.CrossEntropyLoss(),
        seed_layers=True,
        base_seed=SEED,
        partition_method="uniform",
    )
    config = {**engine_config(**case), "gradient_clipping": 0.0}
    engine, *_ = ds_al.initialize(model=module, config=config)
    torch.manual_seed(SEED)
    batches = iter(CONTRAST.batches(2 * MICRO_BATCHES))
    torch.distributed.barrier()
    for _ in range(2):
        engine.train_batch(batches)
    return {name: value.clone() for name, value in engine.module.state_dict().items()}, engine.stats().wall, late


def watch(room: ModuleType) -> list[float]:
    """Fills, until the room is watched anew, with how long after its arrival each delayed message is taken in."""
    late: list[float] = []

    def watched(arrival: Tensor) -> None:
        wait_until(arrival)
        late.append(time.monotonic() - arrival.item())

    room.wait_until = watched  # type: ignore[attr-defined]
    return late


def channel(config: LinkConfig) -> list[tuple[float, int, int]]:
    """Three messages from rank 0 to rank 1: moments of sending or arriving, number, and what the channel counted."""
    rank, device = int(os.environ["RANK"]), torch.device("cpu")
    options: dict[str, Any] = {"device": device, "dynamic": False}
    torch.distributed.barrier()
    seen = []
    if rank == 0:
        sender = SlowSender(pair("test", 1, device=device), link=config, queue_depth=4, stages=(0, 1), **options)
        for number in range(3):
            seen.append((time.monotonic(), number, 0))
            sender.send((torch.tensor([number]), torch.zeros(50)))
        seen.append((time.monotonic(), 3, sender.found_full))
        sender.flush()
    elif rank == 1:
        receiver = SlowReceiver(pair("test", 0, device=device), stages=(1, 0), **options)
        receiver.expect(3)
        for _ in range(3):
            number, _ = receiver.receive()
            seen.append((time.monotonic(), number.item(), receiver.messages))
            receiver.release()
    torch.distributed.barrier()
    return seen


def test_counted_bytes_are_those_of_the_formula() -> None:
    rows = measure_traffic(("transformer",), stages=2, micro_batch=4)
    assert [(row["method"], row["message_dtype"]) for row in rows] == [
        *(("streaming", message_dtype) for message_dtype in COMPRESSIONS), ("bp_1f1b", "fp32"),
    ]  # fmt: skip
    for row in rows:
        assert row["bytes"] == row["formula"], row
    fp32, bf16, int8, _ = rows
    assert fp32["relative_error"] == 0 and 0 < bf16["relative_error"] < 2**-8 < 2 * int8["relative_error"] < 2**-5


@pytest.fixture(scope="module")
def ranks() -> Iterator[list[dict[str, Any]]]:
    yield run_ranks(f"{__name__}:worker", STAGES)


def trained(ranks: list[dict[str, Any]], case: dict[str, Any]) -> tuple[State, Tensor]:
    found = [rank["trained"][[*CASES, EXACT, SLOW].index(case)] for rank in ranks]
    return merge([state for state, *_ in found]), found[0][1]


@pytest.mark.parametrize("message_dtype", ["bf16", "int8"])
def test_every_schedule_and_queue_depth_leaves_the_same_bits(ranks: list[dict[str, Any]], message_dtype: str) -> None:
    first, *others = [case for case in CASES if case["message_dtype"] == message_dtype]
    (state, scores), (exact, _) = trained(ranks, first), trained(ranks, EXACT)
    for case in others:
        assert different(trained(ranks, case)[0], state) == [], case
        assert torch.equal(trained(ranks, case)[1], scores), case
    changed = different(state, exact)
    assert any(name.startswith("3.") for name in changed)  # else nothing was encoded
    assert not [name for name in changed if name.startswith("0.")]  # the first stage receives nothing
    assert all(torch.allclose(state[name], exact[name], atol=0.1) for name in exact if "/" not in name)


def test_evaluation_is_that_of_the_weights_alone(ranks: list[dict[str, Any]]) -> None:
    """Its messages are not encoded, so the scores do not depend on the partition."""
    state, scores = trained(ranks, CASES[-1])
    layers = CONTRAST.build(SEED)
    for index, layer in enumerate(layers):
        layer.load_state_dict({name: state[f"{index}.{name}"] for name in layer.state_dict()})
        layer.eval()
    with torch.no_grad():
        assert torch.equal(predict(layers, CONTRAST.batches(1, seed=1)[0][0], num_classes=4), scores)


def test_a_slow_link_changes_no_bit(ranks: list[dict[str, Any]]) -> None:
    assert different(trained(ranks, SLOW)[0], trained(ranks, EXACT)[0]) == []
    for position, rank in enumerate(ranks):
        (_, _, undelayed), (_, _, late) = rank["trained"][-2:]
        # No count of seconds waited: a rank that comes late to its first message finds it there.
        assert undelayed == [] and min(late, default=0.0) >= 0
        assert len(late) >= (2 * MICRO_BATCHES if position else 0)


def test_the_twin_waits_for_both_directions_and_keeps_its_bits(ranks: list[dict[str, Any]]) -> None:
    for rank, directions in zip(ranks, (1, 2, 1), strict=True):
        (fast, _, untouched), (slow, _, late) = rank["twins"]
        assert different(fast, slow) == []
        assert untouched == [] and len(late) == directions * 2 * MICRO_BATCHES and min(late) >= 0
    # In each batch the first stage gets its gradient when a message has gone down all boundaries, and up again.
    assert ranks[0]["twins"][1][1] >= 2 * 2 * (STAGES - 1) * 0.020


def test_a_message_is_there_when_the_delay_is_over_and_its_sender_has_gone_on(ranks: list[dict[str, Any]]) -> None:
    sent, arrived = ranks[0]["delay"], ranks[1]["delay"]
    assert [number for _, number, _ in arrived] == [0, 1, 2]
    for (start, *_), (end, *_) in zip(sent, arrived, strict=False):
        assert end >= start + DELAY_MS / 1000
    (done, _, found_full), (first_arrival, *_) = sent[3], arrived[0]
    assert done < first_arrival and found_full == 0


def test_messages_wait_for_each_other_on_a_link_of_some_speed(ranks: list[dict[str, Any]]) -> None:
    sent, arrived = ranks[0]["speed"], ranks[1]["speed"]
    seconds = (8 + 50 * 4) * 8 / 10_000
    for position, (end, number, _) in enumerate(arrived):
        assert number == position and end >= sent[0][0] + (position + 1) * seconds
