"""The backprop twin trains with MuonAdamW from its config, under DeepSpeed's LR schedules."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import nn

import ds_al
from ds_al.launch.ranks import run_ranks
from ds_al.optim.muon import MuonAdamW, tag_embeddings
from tests.support.engines import MICRO_BATCHES, engine_config, merge
from tests.support.networks import NETWORKS

pytestmark = pytest.mark.distributed

BATCHES, SEED = 5, 3
OPTIONS = {"lr": 0.02, "adamw_lr": 3e-3}
SCHEDULER = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.02, "warmup_num_steps": 4, "warmup_type": "linear"}}


class Mean(nn.Module):
    """The mean over a sequence ``(B, T, D)``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=1)


LAYERS = [(nn.Embedding, 20, 12), (nn.Linear, 12, 16), (Mean,), (nn.Linear, 16, 4)]


def twin(stages: int) -> Any:
    module = PipelineModule(
        [LayerSpec(*layer) for layer in LAYERS],
        num_stages=stages,
        loss_fn=nn.CrossEntropyLoss(),
        seed_layers=True,
        base_seed=SEED,
        partition_method="uniform",
    )
    config = engine_config(optimizer="MuonAdamW", params=OPTIONS, scheduler=SCHEDULER, method="bp_1f1b")
    engine, *_ = ds_al.initialize(model=module, config={**config, "gradient_clipping": 0.0})
    return engine


def trained(stages: int, folder: str) -> dict[str, Any]:
    """Worker: 5 batches in one go; and 2, a checkpoint, another engine that loads it, 3 more."""
    deepspeed.init_distributed()
    engine = twin(stages)
    batches = NETWORKS["transformer"].batches(BATCHES * MICRO_BATCHES)
    stream = iter(batches)
    rates = []
    for batch in range(BATCHES):
        if batch == 2:
            engine.save_checkpoint(folder)
        rates.append(sorted(set(engine.get_lr())))
        engine.train_batch(stream)
    resumed = twin(stages)
    resumed.load_checkpoint(folder)
    stream = iter(batches[2 * MICRO_BATCHES :])
    for _ in range(2, BATCHES):
        resumed.train_batch(stream)
    groups = engine.optimizer.param_groups
    return {
        "optimizer": type(engine.optimizer).__name__,
        "methods": [(group["method"], [tuple(p.shape) for p in group["params"]]) for group in groups],
        "state": {name: value.clone() for name, value in engine.module.state_dict().items()},
        "resumed": {name: value.clone() for name, value in resumed.module.state_dict().items()},
        "rates": rates,
    }


@pytest.mark.parametrize("stages", [1, 2])
def test_the_twin_trains_with_it_and_resumes_exactly(stages: int, tmp_path: Any) -> None:
    ranks = run_ranks(f"{__name__}:trained", stages, stages=stages, folder=str(tmp_path))
    assert all(rank["optimizer"] == "MuonAdamW" for rank in ranks)
    by_method: dict[str, set[Any]] = {"muon": set(), "adamw": set()}
    for rank in ranks:
        for method, shapes in rank["methods"]:
            by_method[method].update(shapes)
    assert by_method == {"muon": {(16, 12), (4, 16)}, "adamw": {(20, 12), (16,), (4,)}}
    rates = ranks[0]["rates"]
    assert all(len(row) == 1 for row in rates) and len({row[0] for row in rates}) >= 4  # WarmupLR starts at 0, twice
    for rank in ranks:
        assert all(torch.equal(value, rank["resumed"][name]) for name, value in rank["state"].items())
    got = merge([rank["state"] for rank in ranks])
    for name, value in plain([row[0] for row in rates]).items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)


def with_zero() -> str:
    """Worker: what is said where DeepSpeed would make vectors of the matrices."""
    deepspeed.init_distributed()
    module = PipelineModule([nn.Linear(12, 4)], num_stages=1, loss_fn=nn.CrossEntropyLoss())
    config = engine_config(optimizer="MuonAdamW", params=OPTIONS, method="bp_1f1b")
    try:
        ds_al.initialize(model=module, config={**config, "zero_optimization": {"stage": 1}})
    except ds_al.ALConfigError as error:
        return str(error)
    return "trains"


def test_it_is_refused_where_matrices_would_be_flattened() -> None:
    (message,) = run_ranks(f"{__name__}:with_zero", 1)
    assert "MuonAdamW" in message and "stage 0" in message


def plain(rates: list[float]) -> dict[str, torch.Tensor]:
    """The same network in a plain loop, from the same weights."""
    from deepspeed.runtime import utils as ds_utils

    layers = []
    for index, (kind, *arguments) in enumerate(LAYERS):
        ds_utils.set_random_seed(SEED + index)
        layers.append(kind(*arguments))
    model = nn.Sequential(*layers)
    tag_embeddings(model)
    optimizer = MuonAdamW(model.parameters(), **OPTIONS)
    batches = iter(NETWORKS["transformer"].batches(BATCHES * MICRO_BATCHES))
    for rate in rates:
        for group in optimizer.param_groups:
            group["lr"] = rate
        for _ in range(MICRO_BATCHES):
            x, labels = next(batches)
            (nn.functional.cross_entropy(model(x), labels) / MICRO_BATCHES).backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.state_dict())
