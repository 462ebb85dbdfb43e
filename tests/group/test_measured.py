"""``partition_method: measured`` where layers span stages: the bridge weighs on the last stage of its group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.pipe import LayerSpec
from torch import nn

import ds_al
from ds_al.errors import ALConfigError
from ds_al.launch.ranks import run_ranks
from ds_al.models.grouping import Chain
from ds_al.spec import ALLayerSpec
from tests.support.networks import Block

pytestmark = pytest.mark.distributed


class HeavyBridge(nn.Sequential):
    """Costs more than all blocks of f."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(16, 1024), nn.Tanh(), nn.Linear(1024, 1024), nn.Tanh(), nn.Linear(1024, 6))


def measured() -> dict[str, Any]:
    """Worker: what each stage holds, and the table."""
    blocks = [LayerSpec(Block, 16 if i else 12, 16) for i in range(6)]
    layer = ALLayerSpec(
        f=LayerSpec(Chain, blocks), b=LayerSpec(HeavyBridge), g=LayerSpec(nn.Linear, 4, 6), h=LayerSpec(nn.Linear, 6, 4)
    )
    options: dict[str, Any] = {"num_classes": 4, "partition_method": "measured", "partition_cache": "off"}
    module = ds_al.ALPipelineModule([layer], example=torch.randn(8, 12), **options)
    with pytest.raises(ALConfigError, match="memory_limit for more stages than AL layers"):
        ds_al.ALPipelineModule([layer], example=torch.randn(8, 12), memory_limit=1e9, **options)
    with pytest.raises(ALConfigError, match="needs a micro-batch"):
        ds_al.ALPipelineModule([layer], **options)
    return {"runs": module.runs, "table": module.partition_table}


def test_the_last_stage_of_a_group_holds_its_bridge_and_few_blocks() -> None:
    ranks = run_ranks(f"{__name__}:measured", 2)
    assert ranks[0] == ranks[1]
    assert ranks[0]["runs"] == [(0, range(5)), (0, range(5, 6))]
    assert "0, block 5" in ranks[0]["table"] and "measured just now" in ranks[0]["table"]
