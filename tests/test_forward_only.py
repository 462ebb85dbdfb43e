"""Promise 2: in streaming training every message goes from a stage to the next one, and nothing else is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as torch_dist

from ds_al.launch.ranks import run_ranks
from tests.support.engines import MICRO_BATCHES, make_engine
from tests.support.networks import NETWORKS

pytestmark = pytest.mark.distributed

TO_PEER = {"send": "dst", "isend": "dst", "recv": "src", "irecv": "src"}
TRANSFERS = {"send": "group.send", "recv": "group.recv"}
COLLECTIVES = (
    "barrier", "monitored_barrier", "broadcast", "broadcast_object_list", "all_reduce", "reduce", "all_gather",
    "all_gather_into_tensor", "all_gather_object", "gather", "gather_object", "scatter", "reduce_scatter",
    "reduce_scatter_tensor", "all_to_all", "all_to_all_single", "batch_isend_irecv", "new_group",
)  # fmt: skip
BATCHES = 6


def probed(method: str, options: dict[str, Any]) -> list[tuple[str, int | None]]:
    """Worker: every communication call of training, as ``(name, peer)``."""
    engine = make_engine("mlp", method=method, **options)
    batches = iter(NETWORKS["mlp"].batches(BATCHES * MICRO_BATCHES))
    calls: list[tuple[str, int | None]] = []

    def watch(name: str, original: Any) -> Any:
        def watched(*args: Any, **kwargs: Any) -> Any:
            calls.append(
                (name, kwargs.get(TO_PEER[name], args[1] if len(args) > 1 else None) if name in TO_PEER else None)
            )
            return original(*args, **kwargs)

        return watched

    def watch_transfer(name: str, original: Any) -> Any:
        def watched(group: Any, tensors: Any, peer: int, tag: int) -> Any:
            calls.append((name, peer))
            return original(group, tensors, peer, tag)

        return watched

    for name in (*TO_PEER, *COLLECTIVES):
        setattr(torch_dist, name, watch(name, getattr(torch_dist, name)))
    for name, kept in TRANSFERS.items():  # what the functions above would end in
        setattr(torch_dist.ProcessGroup, name, watch_transfer(kept, getattr(torch_dist.ProcessGroup, name)))
    for _ in range(BATCHES):
        engine.train_batch(batches)
    found = list(calls)
    engine.flush()
    return found


def backward_or_collective(ranks: list[list[tuple[str, int | None]]]) -> list[tuple[int, str, int | None]]:
    """Calls that are no send to the next rank and no receive from the previous one."""
    return [
        (rank, name, peer)
        for rank, calls in enumerate(ranks)
        for name, peer in calls
        if (name, peer) not in {("group.send", rank + 1), ("group.recv", rank - 1)}
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
    ranks = run_ranks(f"{__name__}:probed", 3, method="streaming", options=options)
    assert not backward_or_collective(ranks)
    headers = BATCHES * MICRO_BATCHES if "module_options" in options else 1
    sends = BATCHES * MICRO_BATCHES + headers
    assert [sum(name == "group.send" for name, _ in calls) for calls in ranks] == [sends, sends, 0]
    assert [sum(name == "group.recv" for name, _ in calls) for calls in ranks] == [0, sends, sends]


def test_the_probe_sees_the_barrier_of_forward_first() -> None:
    ranks = run_ranks(f"{__name__}:probed", 3, method="forward_first", options={})
    found = backward_or_collective(ranks)
    assert {name for _, name, _ in found} == {"barrier"}
    assert len(found) == 3 * BATCHES
