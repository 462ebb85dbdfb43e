"""``bp_dp``: replicas of the twin train on the very samples that a pipeline would, and stay equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed import comm as dist
from deepspeed.pipe import PipelineModule
from torch import Tensor, nn
from torch.nn import functional as F

import ds_al
from ds_al.baseline import data_parallel
from ds_al.config.base import BLOCK
from ds_al.errors import ALConfigError
from ds_al.models import build_twin
from ds_al.parallel.world import join_world
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

MICRO_BATCHES, BATCHES, SIZE, CLASSES, RATE = 4, 3, 5, 3, 0.1


def twin() -> list[Any]:
    return build_twin("mlp", in_shape=(1, 4, 4), num_classes=CLASSES, widths=(8, 8))


def samples() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(SIZE, 1, 4, 4, generator=generator),
            torch.randint(CLASSES, (SIZE,), generator=generator),
        )
        for _ in range(MICRO_BATCHES * BATCHES)
    ]


def train_on_rank() -> dict[str, Any]:
    join_world()
    replicas = dist.get_world_size()
    config = {
        "train_micro_batch_size_per_gpu": SIZE,
        "gradient_accumulation_steps": data_parallel.micro_batches_per_replica(MICRO_BATCHES, replicas),
        "optimizer": {"type": "SGD", "params": {"lr": RATE}},
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        BLOCK: {"method": data_parallel.METHOD},
    }
    with pytest.raises(ALConfigError, match="bp_dp got a PipelineModule of 2 stages: expected 1"):
        ds_al.initialize(model=PipelineModule(twin(), num_stages=2, loss_fn=nn.CrossEntropyLoss()), config=config)
    torch.manual_seed(dist.get_rank())  # replicas begin as the first one, whatever each of them drew
    engine, *_ = ds_al.initialize(
        model=data_parallel.replica_module(twin(), loss_fn=nn.CrossEntropyLoss()), config=config
    )
    start = [parameter.detach().clone() for parameter in engine.module.parameters()]
    own = data_parallel.share(samples(), replica=dist.get_rank(), replicas=replicas)
    losses = [float(engine.train_batch(own)) for _ in range(BATCHES)]
    return {
        "start": start,
        "end": [parameter.detach().clone() for parameter in engine.module.parameters()],
        "losses": losses,
        "evaluation": engine.evaluate(samples()[:2]),
        "left": len(list(own)),
    }


def test_replicas_train_as_one_process_would() -> None:
    first, second = run_ranks(f"{__name__}:train_on_rank", 2)
    for key in ("start", "end"):
        assert all(torch.equal(a, b) for a, b in zip(first[key], second[key], strict=True)), key
    assert first["losses"] == second["losses"] and first["left"] == second["left"] == 0
    modules = nn.Sequential(*(spec.build() for spec in twin()))
    with torch.no_grad():
        for parameter, value in zip(modules.parameters(), first["start"], strict=True):
            parameter.copy_(value)
    losses = []
    for start in range(0, MICRO_BATCHES * BATCHES, MICRO_BATCHES):
        batch = samples()[start : start + MICRO_BATCHES]
        loss = torch.stack([F.cross_entropy(modules(x), y) for x, y in batch]).mean()
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, list(modules.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(modules.parameters(), gradients, strict=True):
                parameter -= RATE * gradient
    torch.testing.assert_close(first["end"], [p.detach() for p in modules.parameters()])
    assert first["losses"] == pytest.approx(losses, rel=1e-5)
    with torch.no_grad():
        x, y = (torch.cat(part) for part in zip(*samples()[:2], strict=True))
        accuracy = (modules(x).argmax(dim=1) == y).double().mean().item()
    assert first["evaluation"]["accuracy"] == pytest.approx([accuracy])
