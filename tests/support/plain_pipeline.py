"""A script that knows no ds_al: trains DeepSpeed's own pipeline and writes its weights.

    python plain_pipeline.py OUT [--import]

With ``--import`` ds_al is imported first, and an AL engine trains in this process before the plain one.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe import engine as pipe_engine
from deepspeed.runtime.pipe import schedule
from torch import nn


def main() -> None:
    """One rank."""
    torch.set_num_threads(1)
    found = {
        "map": dict(pipe_engine.PipelineEngine._INSTRUCTION_MAP),
        "methods": {name: vars(pipe_engine.PipelineEngine)[name] for name in vars(pipe_engine.PipelineEngine)},
        "schedule": {name: getattr(schedule, name) for name in vars(schedule)},
        "comm": {name: getattr(deepspeed.comm, name) for name in vars(deepspeed.comm)},
        "initialize": deepspeed.initialize,
    }
    if "--import" in sys.argv:
        train_with_ds_al()
    else:
        assert not any(name.split(".")[0] == "ds_al" for name in sys.modules)
    assert found["map"] == pipe_engine.PipelineEngine._INSTRUCTION_MAP
    for name, value in found["methods"].items():
        assert vars(pipe_engine.PipelineEngine)[name] is value or name == "_abc_impl", name
    for name, value in found["schedule"].items():
        assert getattr(schedule, name) is value, name
    for name, value in found["comm"].items():
        assert getattr(deepspeed.comm, name) is value or not callable(value), name
    assert deepspeed.initialize is found["initialize"]

    deepspeed.init_distributed()
    layers = [
        LayerSpec(nn.Linear, 12, 16),
        LayerSpec(nn.Tanh),
        LayerSpec(nn.Linear, 16, 16),
        LayerSpec(nn.Linear, 16, 4),
    ]
    module = PipelineModule(
        layers,
        num_stages=2,
        loss_fn=nn.CrossEntropyLoss(),
        seed_layers=True,
        base_seed=3,
        partition_method="uniform",  # any other, with seeds, fails in DeepSpeed 0.19.8
    )
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True, "fused": True}},
    }
    engine, *_ = deepspeed.initialize(model=module, config=config)
    assert type(engine) is pipe_engine.PipelineEngine
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(8, 12, generator=generator), torch.randint(4, (8,), generator=generator)) for _ in range(20)
    ]
    stream = iter(batches)
    for _ in range(5):
        engine.train_batch(stream)
    torch.save(module.state_dict(), Path(sys.argv[1]) / f"rank{os.environ['RANK']}.pt")


def train_with_ds_al() -> None:
    """Trains an AL engine in this process."""
    from tests.support.engines import MICRO_BATCHES, make_engine
    from tests.support.networks import NETWORKS

    engine = make_engine("mlp")
    for _ in range(2):
        engine.train_batch(iter(NETWORKS["mlp"].batches(MICRO_BATCHES)))
    engine.evaluate(NETWORKS["mlp"].batches(2))


if __name__ == "__main__":
    main()
