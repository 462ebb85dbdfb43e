"""Weights that get their first gradient later than others, as experts do, step as with an optimizer of their own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ds_al.layer import ALLayer
from ds_al.optim.local import LocalOptimizer
from tests.support.blocks import Experts


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.5}, {}])
def test_fused_sgd_steps_experts_that_come_late(options: dict[str, float]) -> None:
    """torch's own fused step fails there, since it takes momentum buffers of all weights or of none."""
    torch.manual_seed(0)
    layer = ALLayer(Experts(4, 4), *(nn.Linear(4, 4) for _ in "bgh"))
    other = copy.deepcopy(layer)
    options = {"lr": 0.1, "fused": True, **options}
    whole = LocalOptimizer(
        [(0, layer)],
        associated=lambda groups: torch.optim.SGD(groups, **options),
        autoencoder=lambda groups: torch.optim.SGD(groups, **options),
    )
    single = [torch.optim.SGD([weight], **options) for weight in other.parameters()]
    t = torch.randn(8, 4)
    for sign in (-1.0, -1.0, 1.0, -1.0, 1.0):
        x = torch.randn(8, 4)
        x[0, 0] = sign
        for each, optimizers in ((layer, [whole]), (other, single)):
            sum(each.local_losses(*each(x, t), t)).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), other.parameters(), strict=True))
