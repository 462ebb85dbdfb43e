"""Channels between real ranks: what the shapes of messages may do, and what errors say."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ds_al
from ds_al.launch.ranks import RankFailure, run_ranks
from tests.support.engines import SEED, different, engine_config, engine_state, merge
from tests.support.networks import NETWORKS, mlp_layers

pytestmark = pytest.mark.distributed


class Widening(nn.Module):
    """Pads its output by one column from the third micro-batch on; the bridge reads the first 16."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.count = block, 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return nn.functional.pad(self.block(x[:, :16]), (0, int(self.count > 2)))


class Narrow(nn.Module):
    """Reads the first 16 columns."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :16]


def trained(dynamic: bool) -> Any:
    """Worker: a layer whose output changes its shape, in the middle of a stage boundary."""
    module = ds_al.ALPipelineModule(mlp_layers(), num_classes=4, base_seed=SEED, dynamic_shape=dynamic)
    for index, layer in module.local_layers:
        layer.b = nn.Sequential(Narrow(), layer.b)
        layer.f = Widening(layer.f) if index == 1 else nn.Sequential(Narrow(), layer.f)
    engine, *_ = ds_al.initialize(model=module, config=engine_config())
    batches = iter(NETWORKS["mlp"].batches(8))
    for _ in range(2):
        engine.train_batch(batches)
    engine.flush()
    return engine_state(engine)


def test_a_layer_may_change_its_shape_where_shapes_are_dynamic() -> None:
    (alone,) = run_ranks(f"{__name__}:trained", 1, dynamic=True)
    assert different(merge(run_ranks(f"{__name__}:trained", 2, dynamic=True)), alone) == []


def test_a_changed_shape_is_named_with_its_remedies() -> None:
    with pytest.raises(RankFailure) as caught:
        run_ranks(f"{__name__}:trained", 2, dynamic=False)
    first = str(caught.value).split("--- rank ")[1]
    assert first.startswith("0,")
    assert "f returned (8, 17) float32 after (8, 16) float32" in first
    assert "reset_activation_shape" in first and "dynamic_shape=True" in first


def deep() -> list[Any]:
    """Worker: trains and reads exits of a network of 30 layers."""
    count = 30
    layers = [*mlp_layers(), *(mlp_layers()[-1] for _ in range(count - 4))]
    module = ds_al.ALPipelineModule(layers, num_classes=4, base_seed=SEED, partition_method="parameters")
    engine, *_ = ds_al.initialize(model=module, config=engine_config(queue_depth=4))
    engine.train_batch(iter(NETWORKS["mlp"].batches(4)))
    x = torch.cat([x for x, _ in NETWORKS["mlp"].batches(2)]) if int(os.environ["RANK"]) == 0 else None
    scores = [engine.predict(x, exit=m) for m in (1, count // 2 + 1, count)]
    return [engine_state(engine), scores]


def test_many_layers_and_a_partition_by_parameters() -> None:
    """A network of 30 decoders is evaluated, and DeepSpeed's balanced partition can be built."""
    ((state, scores),) = run_ranks(f"{__name__}:deep", 1)
    ranks = run_ranks(f"{__name__}:deep", 3)
    assert different(merge([rank[0] for rank in ranks]), state) == []
    assert all(rank[0] for rank in ranks)
    for rank in ranks:
        assert all(torch.equal(one, two) for one, two in zip(rank[1], scores, strict=True))
