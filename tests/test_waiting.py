"""A stage waits for its own input and for room in its queue, for nothing else; and a failure ends the job."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ds_al
from ds_al.launch.ranks import RankFailure, free_port, run_ranks
from tests.support.engines import MICRO_BATCHES, SEED, engine_config, make_engine
from tests.support.networks import NETWORKS, mlp_layers

pytestmark = [pytest.mark.distributed, pytest.mark.alone]
ROOT = Path(__file__).resolve().parents[1]

BATCHES = 8
SLOW = range(4, 12)  # micro-batches of which the last stage takes ten times longer than of the others


class Slow(nn.Module):
    """Runs a block, and sleeps: long for some micro-batches of the last layer, briefly for all others."""

    def __init__(self, block: nn.Module, log: list[tuple[float, int]], slow: bool) -> None:
        super().__init__()
        self.block, self.log, self.slow, self.count = block, log, slow, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.log.append((time.perf_counter(), self.count))
        time.sleep(0.1 if self.slow and self.count in SLOW else 0.01)
        self.count += 1
        return self.block(x)


def starts(queue_depth: int) -> list[float]:
    """Worker: when this stage started each micro-batch's forward."""
    specs = mlp_layers()
    log: list[tuple[float, int]] = []
    world = int(os.environ["WORLD_SIZE"])
    module = ds_al.ALPipelineModule(specs[:world], num_classes=4, base_seed=SEED)
    for index, layer in module.local_layers:
        layer.f = Slow(layer.f, log, slow=index == world - 1)
    engine, *_ = ds_al.initialize(model=module, config=engine_config(queue_depth=queue_depth))
    batches = iter(NETWORKS["mlp"].batches(BATCHES * MICRO_BATCHES))
    for _ in range(BATCHES):
        engine.train_batch(batches)
    engine.flush()
    return [at for at, _ in log]


@pytest.mark.parametrize("queue_depth", [1, 2, 4])
def test_earlier_stages_run_on_until_the_queue_is_full(queue_depth: int) -> None:
    ranks = run_ranks(f"{__name__}:starts", 3, queue_depth=queue_depth)
    assert [len(rank) for rank in ranks] == [BATCHES * MICRO_BATCHES] * 3
    # Of what stage 1 has started, the last stage has not: queue_depth messages wait at the sender, one is
    # received ahead, and one more is in the making.
    ahead = max(k - sum(at <= mine for at in ranks[2]) for k, mine in enumerate(ranks[1], start=1))
    assert queue_depth + 2 <= ahead <= queue_depth + 3
    # The first stage, in turn, is ahead of stage 1 no further, and so never further than twice that.
    total = max(k - sum(at <= mine for at in ranks[2]) for k, mine in enumerate(ranks[0], start=1))
    assert ahead < total <= 2 * (queue_depth + 3)


def watched(network: str) -> float:
    """Worker: trains 20 micro-batches while any wait of the host for its GPU is an error."""
    engine = make_engine(network)
    batches = iter(NETWORKS[network].batches(6 * MICRO_BATCHES))
    engine.train_batch(batches)  # the first one announces shapes, and allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            loss = engine.train_batch(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    engine.flush()
    return loss.item()


@pytest.mark.cuda
@pytest.mark.parametrize("network", ["mlp", "vgg", "transformer"])  # cuDNN's LSTM needs the lengths on the host
@pytest.mark.parametrize("stages", [1, 2])
def test_no_host_waits_for_its_gpu(stages: int, network: str) -> None:
    if torch.cuda.device_count() < stages:
        pytest.skip(f"NCCL needs a GPU for each of {stages} stages")
    losses = run_ranks(f"{__name__}:watched", stages, env={"DS_ACCELERATOR": "cuda"}, network=network)
    assert all(loss > 0 for loss in losses)


class Broken(nn.Module):
    """Raises on its sixth micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.count = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        if self.count == 6:
            raise ArithmeticError("the sixth is too much")
        return x * self.weight


def broken(stage: int) -> None:
    """Worker: the layer of one stage raises in the middle of training."""
    specs = mlp_layers()[:3]
    module = ds_al.ALPipelineModule(specs, num_classes=4, base_seed=SEED)
    for index, layer in module.local_layers:
        if index == stage:
            layer.f = nn.Sequential(layer.f, Broken())
    engine, *_ = ds_al.initialize(model=module, config=engine_config())
    batches = iter(NETWORKS["mlp"].batches(BATCHES * MICRO_BATCHES))
    for _ in range(BATCHES):
        engine.train_batch(batches)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_stage_that_raises_ends_the_job_and_is_named_first(stage: int) -> None:
    with pytest.raises(RankFailure) as caught:
        run_ranks(f"{__name__}:broken", 3, stage=stage)
    assert caught.value.seconds < 60
    first = str(caught.value).split("--- rank ")[1]
    assert first.startswith(f"{stage},"), str(caught.value)[-2000:]
    assert f"stage {stage}, AL layer" in first and "the sixth is too much" in first
    assert "micro-batch 5" in first


def test_the_launcher_ends_the_job_within_30_seconds(tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 50,
        "gradient_accumulation_steps": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e30, "torch_adam": True}},
        "experiment": {
            "name": "diverges",
            "model": {"name": "mlp", "options": {"widths": [16, 16]}},
            "data": {"name": "fashion-mnist-small"},
            "epochs": 100,
            "output": str(tmp_path / "runs"),
            "wandb": {"enabled": False},
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    start = time.monotonic()
    result = subprocess.run(
        [
            sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2",
            "--master_port", str(free_port()), str(ROOT / "run/train.py"),
            "--deepspeed_config", str(tmp_path / "config.json"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert result.returncode != 0
    assert time.monotonic() - start < 90  # start-up included
    traceback = result.stderr.index("Traceback")
    assert re.search("(holds|loss is) -?(nan|inf)", result.stderr)
    lost = result.stderr.find("lost stage")
    assert lost == -1 or traceback < lost
    assert "AL layer" in result.stderr and "lower the learning rate" in result.stderr
