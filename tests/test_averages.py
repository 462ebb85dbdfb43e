"""Averages of weights (EMA), as users keep them: by torch's own class, on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.support.engines import MICRO_BATCHES, State, different, engine_state, make_engine, merge
from tests.support.networks import NETWORKS
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

BF16 = {"bf16": {"enabled": True}}


def averaged(network: str, keys: dict[str, Any]) -> dict[str, Any]:
    """Worker: an average beside the training, which is evaluated half way; and the same training without it."""
    batches = NETWORKS[network].batches(4 * MICRO_BATCHES)
    plain = make_engine(network, keys=keys)
    engine = make_engine(network, keys=keys)
    average = AveragedModel(engine.module, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=False)
    mine, theirs = iter(batches), iter(batches)
    for _ in range(4):
        plain.train_batch(theirs)
        engine.train_batch(mine)
        average.update_parameters(engine.module)
        now = {name: value.clone() for name, value in engine.module.state_dict().items()}
        engine.module.load_state_dict(average.module.state_dict())
        scores: Tensor = engine.predict(batches[0][0])
        engine.module.load_state_dict(now)
    return {
        "average": {f"{i}.{n}": v for i, layer in average.module.local_layers for n, v in layer.state_dict().items()},
        "scores": scores,
        "differs": not torch.equal(scores, engine.predict(batches[0][0])),
        "engine": engine_state(engine),
        "plain": engine_state(plain),
    }


@pytest.mark.parametrize(("network", "keys"), [("mlp", {}), ("vgg", BF16)])
def test_an_average_is_that_of_one_process_and_leaves_the_training_alone(network: str, keys: dict[str, Any]) -> None:
    (alone,) = run_ranks(f"{__name__}:averaged", 1, network=network, keys=keys)
    ranks = run_ranks(f"{__name__}:averaged", 2, network=network, keys=keys)
    whole: State = merge([rank["average"] for rank in ranks])
    assert different(whole, alone["average"]) == []
    for rank in [alone, *ranks]:
        assert different(rank["engine"], rank["plain"]) == [] and rank["differs"]
        assert torch.equal(rank["scores"], alone["scores"])
