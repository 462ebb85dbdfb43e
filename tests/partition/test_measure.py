"""``partition_method: measured`` and ``cuts:``: the stages they make, and that the weights do not depend on them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from torch import Tensor, nn

import ds_al
from ds_al.launch.ranks import RankFailure, run_ranks
from tests.support.engines import MICRO_BATCHES, SEED, State, different, engine_config, engine_state, merge
from tests.support.networks import NETWORKS, mlp_layers

pytestmark = [pytest.mark.distributed, pytest.mark.alone]


class Slow(nn.Module):
    """A block that takes longer."""

    def __init__(self, block: nn.Module, seconds: float) -> None:
        super().__init__()
        self.block, self.seconds = block, seconds

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return self.block(x)


def slow_first(seconds: float) -> list[ds_al.ALLayerSpec]:
    """The test network; its first layer takes as long as all others together, and more."""
    specs = mlp_layers()
    block = specs[0].parts["f"]
    specs[0].parts["f"] = lambda: Slow(block.build(), seconds)
    return specs


def trained(method: str, with_example: bool = True) -> tuple[list[int], State]:
    """Worker: the partition, and the state after three batches."""
    deepspeed.init_distributed()
    net, options = NETWORKS["mlp"], {}
    if with_example:
        options["example"] = torch.zeros(8, 12)
    module = ds_al.ALPipelineModule(
        slow_first(0.03), num_classes=net.classes, base_seed=SEED, partition_method=method, **options
    )
    engine, *_ = ds_al.initialize(model=module, config=engine_config())
    batches = iter(net.batches(3 * MICRO_BATCHES))
    for _ in range(3):
        engine.train_batch(batches)
    engine.flush()
    assert (module.partition_table is not None) == (method == "measured")
    assert method != "measured" or "the slowest stage takes" in str(module.partition_table)
    return list(module.parts), engine_state(engine)


def test_the_slow_layer_gets_a_stage_of_its_own_and_the_weights_stay_the_same() -> None:
    results: dict[str, list[Any]] = {
        method: run_ranks(f"{__name__}:trained", 2, method=method) for method in ("uniform", "measured", "cuts:3")
    }
    parts = {method: [rank[0] for rank in ranks] for method, ranks in results.items()}
    assert parts == {"uniform": [[0, 2, 4]] * 2, "measured": [[0, 1, 4]] * 2, "cuts:3": [[0, 3, 4]] * 2}
    states = {method: merge([rank[1] for rank in ranks]) for method, ranks in results.items()}
    assert different(states["uniform"], states["measured"]) == []
    assert different(states["uniform"], states["cuts:3"]) == []


def measured(seconds: float, slower: float, cache: str, limit: float | None = None) -> tuple[list[int], str]:
    """Worker: the cut of four equal layers that sleep, on ranks of which the second is so many times slower."""
    deepspeed.init_distributed()
    specs, slept = mlp_layers(), seconds * slower ** deepspeed.comm.get_rank()
    for spec in specs:
        spec.parts["f"] = lambda block=spec.parts["f"]: Slow(block.build(), slept)
    module = ds_al.ALPipelineModule(
        specs,
        num_classes=4,
        partition_method="measured",
        example=torch.zeros(8, 12),
        config=engine_config(optimizer="SGD", params={"lr": 0.1}, steps_per_batch=1),
        memory_limit=limit,
        partition_cache=cache,
    )
    return module.parts, str(module.partition_table)


def cached(folder: str) -> list[tuple[list[int], str]]:
    """Worker: measures, finds, measures again, finds a file that is damaged, and keeps nothing."""
    own = Path(folder, os.environ["RANK"])  # on disks that are not shared
    os.environ["DS_AL_CACHE"] = str(own)
    results = []
    for cache in ("use", "use", "refresh", "use", "off"):
        if len(results) == 3:
            for file in own.glob("*.json"):
                file.write_text("{")
        results.append(measured(0.02, 3.0, cache))
    return results


def test_a_slow_rank_gets_less_and_what_was_measured_is_kept(tmp_path: Path) -> None:
    ranks = run_ranks(f"{__name__}:cached", 2, folder=str(tmp_path))
    assert ranks[0] == ranks[1]  # the cut, the times, and where they come from
    assert [parts for parts, _ in ranks[0]] == [[0, 3, 4]] * 5
    tables = [table for _, table in ranks[0]]
    assert [table.rpartition("\n")[2].partition(":")[0] for table in tables] == [
        *("measured just now", "measured before", "measured just now", "measured just now", "measured just now")
    ]
    times = [table.rpartition("\n")[0] for table in tables]
    assert times[0] == times[1] != times[2]
    assert [len(list((tmp_path / str(rank)).glob("*"))) for rank in range(2)] == [1, 0]


def test_no_cut_within_the_memory_limit() -> None:
    with pytest.raises(RankFailure) as failure:
        run_ranks(f"{__name__}:measured", 2, seconds=0.0, slower=1.0, cache="off", limit=1000.0)
    for output in failure.value.outputs:
        assert "no cut into 2 stages keeps each within the memory limit of 1000: the cut that needs least" in output


def test_measuring_needs_an_example() -> None:
    with pytest.raises(RankFailure) as failure:
        run_ranks(f"{__name__}:trained", 1, method="measured", with_example=False)
    assert 'partition_method "measured" needs a micro-batch' in failure.value.outputs[0]
