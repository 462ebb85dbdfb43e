"""Two hosts, joined by a link: the weights are those of one host, and all that surrounds training works there, too."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from torch import nn

import ds_al
from ds_al.models import build_twin
from ds_al.parallel.world import join_world
from tests.group.test_exactness import SCHEDULES, Case, trained
from tests.support.engines import MICRO_BATCHES, SEED, different, engine_config, engine_state, make_engine, merge
from tests.support.hosts import Host, Places, two_hosts
from tests.support.networks import NETWORKS
from tests.support.ranks import RankFailure, run_ranks
from tests.support.sockets import listening_here

pytestmark = [pytest.mark.distributed, pytest.mark.alone]

BATCHES, AHEAD = 2, 50_000.0
HALVES = {2: (0, 1), 4: (0, 0, 1, 1)}
"""Host of each rank, by the number of ranks."""
WORDS: dict[str, Any] = {
    "vocab_size": 20, "num_classes": 4, "width": 8, "heads": 2, "feed_forward": 12, "max_length": 7,
}  # fmt: skip


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, Host]]:
    with two_hosts(tmp_path_factory.mktemp("hosts")) as both:
        yield both


def on(hosts: tuple[Host, Host], worker: str, world: int, **options: Any) -> list[Any]:
    """The results of a worker whose ranks are on two hosts, half of them on each."""
    places = Places(hosts[number] for number in HALVES[world])
    env = {"MASTER_ADDR": hosts[0].address}
    return run_ranks(f"{__name__}:{worker}", world, env=env, places=places, **options)


def everything(places: Places | None, shared: str) -> dict[str, Any]:
    """Worker: training by two methods, and all that surrounds it. The clock of the second host is ahead."""
    if places is not None and places.here().name == "node1":
        real = time.perf_counter
        time.perf_counter = lambda: real() + AHEAD
    data = NETWORKS["mlp"]
    engine = make_engine("mlp", trace={"enabled": True, "batches": [1, 1], "folder": f"{shared}/trace"})
    batches, listens = iter(data.batches((BATCHES + 1) * MICRO_BATCHES)), listening_here()
    for _ in range(BATCHES):
        engine.train_batch(batches)
        listens |= listening_here()
    found: dict[str, Any] = {
        "streaming": engine_state(engine),
        "losses": engine.gather_losses(),
        "evaluation": engine.evaluate(data.batches(3)),
        "exit": engine.predict(data.batches(1)[0][0], exit=1),
        "early": engine.inference.predict_early(data.batches(1)[0][0], confidence=0.3),
    }
    assert engine.tracing is not None and engine.tracing.events
    found["clock"] = engine.tracing.clock.offset, engine.tracing.clock.error
    found["span"] = max(event.end for event in engine.tracing.events)
    engine.save_checkpoint(f"{shared}/checkpoints")
    engine.train_batch(batches)
    found["later"] = engine_state(engine)
    resumed = make_engine("mlp")
    resumed.load_checkpoint(f"{shared}/checkpoints")
    resumed.train_batch(iter(data.batches((BATCHES + 1) * MICRO_BATCHES)[BATCHES * MICRO_BATCHES :]))
    found["resumed"] = engine_state(resumed)
    found["bounds"] = measured()
    found["bp_1f1b"] = twin()
    found["listens"] = listens | listening_here()
    found["segments"] = sorted(path.name for path in Path("/dev/shm").glob("deepspeed*"))
    return found


def twin() -> dict[str, torch.Tensor]:
    """Weights of the backprop twin."""
    module = PipelineModule(
        build_twin("transformer", **WORDS),
        num_stages=dist.get_world_size(),
        loss_fn=nn.CrossEntropyLoss(),
        seed_layers=True,
        base_seed=SEED,
        partition_method="uniform",
    )
    config = {**engine_config(method="bp_1f1b"), "gradient_clipping": 0.0}
    engine, *_ = ds_al.initialize(model=module, config=config)
    torch.manual_seed(SEED)
    batches = iter(NETWORKS["transformer"].batches(MICRO_BATCHES))
    engine.train_batch(batches)
    return {name: value.clone() for name, value in engine.module.state_dict().items()}


def measured() -> list[int]:
    """Bounds of stages that are measured; each host has a cache of its own, and only the first one writes it."""
    data = NETWORKS["mlp"]
    module = ds_al.ALPipelineModule(
        data.layers(), num_classes=4, base_seed=SEED, partition_method="measured", example=data.batches(1)[0][0],
        config=engine_config(),
    )  # fmt: skip
    return [int(bound) for bound in module.parts]


def test_two_hosts_train_and_do_all_that_one_host_does(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    far, near = ({"shared": str(tmp_path / name)} for name in ("far", "near"))
    two = on(hosts, "everything", 2, **far)
    one = run_ranks(f"{__name__}:everything", 2, places=None, **near)
    for name in ("streaming", "later", "resumed"):
        assert different(merge([rank[name] for rank in two]), merge([rank[name] for rank in one])) == [], name
    assert different(merge([rank["later"] for rank in two]), merge([rank["resumed"] for rank in two])) == []
    for apart, together in zip(two, one, strict=True):
        assert different(apart["bp_1f1b"], together["bp_1f1b"]) == []
        assert torch.equal(apart["losses"], together["losses"]) and torch.equal(apart["exit"], together["exit"])
        assert all(torch.equal(a, b) for a, b in zip(apart["early"], together["early"], strict=True))
        assert apart["evaluation"] == together["evaluation"]
        assert apart["span"] < 60, "the events of both hosts are on one clock"
        assert apart["segments"] == []
        assert together["listens"] == {"127.0.0.1"}
    assert [rank["listens"] for rank in two] == [{host.address} for host in hosts]
    (offset, error), bounds = two[1]["clock"], [rank["bounds"] for rank in two]
    assert abs(offset - AHEAD) <= error + 1e-6 and error < 0.1
    assert bounds[0] == bounds[1] and [rank["clock"][0] for rank in one] == [0.0, pytest.approx(0.0, abs=0.1)]
    assert [bool(list((host.folder / "cache").glob("*"))) for host in hosts] == [True, False]
    assert {path.name for path in (tmp_path / "far").iterdir()} == {"trace", "checkpoints"}


def interfaces(places: Places) -> tuple[set[str], str | None]:
    """Worker: where this rank listens once an engine is made, and which interface NCCL is told."""
    make_engine("mlp")
    return listening_here(), os.environ.get("NCCL_SOCKET_IFNAME")


def test_ranks_that_share_a_host_stay_on_its_loopback_interface(
    hosts: tuple[Host, Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever ``MASTER_ADDR`` is: only the store listens there."""
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)  # of a world that an earlier test has joined
    env, first = {"MASTER_ADDR": hosts[0].address}, hosts[0]
    one, two = run_ranks(f"{__name__}:interfaces", 2, env=env, places=Places((first, first)))
    assert (one, two) == (({first.address, "127.0.0.1"}, "=lo"), ({"127.0.0.1"}, "=lo"))
    apart = on(hosts, "interfaces", 2)
    assert apart == [({host.address}, None) for host in hosts]


def replicas(places: Places | None, stages: int) -> dict[str, Any]:
    """Worker: trains ``stages`` stages, with as many replicas as there are ranks for."""
    data = NETWORKS["mlp"]
    module = ds_al.ALPipelineModule(data.layers(), num_classes=4, base_seed=SEED, num_stages=stages)
    engine, *_ = ds_al.initialize(model=module, config=engine_config())
    count = engine.replicas.count
    mine = iter(data.batches(BATCHES * MICRO_BATCHES * count)[engine.replicas.index :: count])
    for _ in range(BATCHES):
        engine.train_batch(mine)
    engine.flush()
    return {f"{engine.replicas.index}/{name}": value for name, value in engine_state(engine).items()}


@pytest.mark.slow
@pytest.mark.parametrize("stages", [2, 4], ids=["two replicas of two stages", "four stages"])
def test_two_ranks_on_each_of_two_hosts(hosts: tuple[Host, Host], stages: int) -> None:
    two = on(hosts, "replicas", 4, stages=stages)
    one = run_ranks(f"{__name__}:replicas", 4, places=None, stages=stages)
    assert different(merge(two), merge(one)) == []


def grouped(places: Places | None, layers: int) -> list[dict[str, torch.Tensor]]:
    """Worker: trains K layers whose groups span stages, each schedule of a group in turn."""
    return trained([Case("transformer", layers, 4, schedule) for schedule in SCHEDULES])


@pytest.mark.parametrize(("layers", "stages"), [(1, 2), pytest.param(2, 4, marks=pytest.mark.slow)])
def test_groups_of_stages_on_two_hosts_leave_the_bits_of_one_host(
    hosts: tuple[Host, Host], layers: int, stages: int
) -> None:
    """With K = 1 gradients go from host to host, with K = 2 within each host."""
    two, one = (
        on(hosts, "grouped", stages, layers=layers),
        run_ranks(f"{__name__}:grouped", stages, places=None, layers=layers),
    )
    for number in range(3):
        assert different(merge([rank[number] for rank in two]), merge([rank[number] for rank in one])) == []


def linked(places: Places | None, method: str) -> None:
    """Worker: asks for a link between hosts to be emulated."""
    if method == "streaming":
        make_engine("mlp", link={"delay_ms": 1})
        return
    join_world()
    module = PipelineModule([nn.Linear(2, 2), nn.Linear(2, 2)], num_stages=2, loss_fn=nn.CrossEntropyLoss())
    ds_al.initialize(model=module, config=engine_config(method=method, link={"delay_ms": 1}))


@pytest.mark.parametrize("method", ["streaming", pytest.param("bp_1f1b", marks=pytest.mark.slow)])
def test_an_emulated_link_between_hosts_is_refused(hosts: tuple[Host, Host], method: str) -> None:
    with pytest.raises(RankFailure) as caught:
        on(hosts, "linked", 2, method=method)
    for output in caught.value.outputs:
        assert '"associated_learning.link"' in output and "node0, node1" in output, output
    assert caught.value.seconds < 60


def stalled(places: Places | None) -> None:
    """Worker: the second stage does not come to its training."""
    engine = make_engine("mlp", stall_seconds=2.0, on_stall="end", queue_depth=1)
    if engine.stage_id == 1:
        time.sleep(30)
    batches = iter(NETWORKS["mlp"].batches(8 * MICRO_BATCHES))
    for _ in range(8):
        engine.train_batch(batches)


@pytest.mark.slow
def test_a_stall_is_reported_on_both_hosts(hosts: tuple[Host, Host]) -> None:
    with pytest.raises(RankFailure) as caught:
        on(hosts, "stalled", 2)
    assert "waits for a free slot in its queue to stage 1 (rank 1)" in caught.value.outputs[0]
    assert all("--- stall: no stage moved" in output for output in caught.value.outputs)
