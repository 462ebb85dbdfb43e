"""With real ranks: the last stage knows how all stages are doing, and finds the slowest."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from ds_al.experiment.live import slowest
from ds_al.launch.ranks import run_ranks
from ds_al.trace import StageMetrics
from tests.support.engines import MICRO_BATCHES, make_engine
from tests.support.networks import NETWORKS

pytestmark = [pytest.mark.distributed, pytest.mark.alone]
BATCHES = 6


class Sleeps(nn.Module):
    """Runs a block, and sleeps."""

    def __init__(self, block: nn.Module, seconds: float) -> None:
        super().__init__()
        self.block, self.seconds = block, seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return self.block(x)


def known(slow: int) -> tuple[dict[int, StageMetrics], list[list[float]]]:
    """Worker: what this stage knows after some batches, of which one stage takes longer than the others."""
    engine = make_engine()
    for _, layer in engine.layers:
        layer.f = Sleeps(layer.f, 0.04 if engine.stage_id == slow else 0.002)
    batches = iter(NETWORKS["mlp"].batches(BATCHES * MICRO_BATCHES))
    for _ in range(BATCHES):
        engine.train_batch(batches)
    engine.flush()
    return engine.stage_metrics(), engine.report.tolist()


@pytest.mark.parametrize("slow", [0, 1])
def test_the_last_stage_knows_who_is_the_slowest(slow: int) -> None:
    first, last = run_ranks(f"{__name__}:known", 2, slow=slow)
    stage_metrics, report = last
    assert list(first[0]) == [0] and list(stage_metrics) == [0, 1]  # nothing comes back
    assert torch.isnan(torch.tensor(first[1][2:])).all() and not torch.isnan(torch.tensor(report)).any()
    # The first stage's are of the end of its last batch but one: they came with the messages of its last.
    assert stage_metrics[0].micro_batches == (BATCHES - 1) * MICRO_BATCHES
    assert stage_metrics[1].micro_batches == BATCHES * MICRO_BATCHES
    found = slowest({stage: now.busy for stage, now in stage_metrics.items()})
    assert found is not None and found.stage == slow
    # Before a slow stage the queue is full most of the time, before a fast one it is not.
    assert (stage_metrics[0].queue_full > 0.5) == (slow == 1)
    expected = 8 / (2 * 0.04)  # samples of a micro-batch, by the seconds that the slow stage's two layers take
    assert all(0.3 * expected < now.samples_per_second <= 1.1 * expected for now in stage_metrics.values())
