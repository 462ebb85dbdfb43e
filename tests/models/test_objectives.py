"""Every model learns by every objective: one step, and who trains what."""

from __future__ import annotations

import copy

import pytest
import torch

from ds_al.layer import predict
from ds_al.objectives import OBJECTIVES
from ds_al.tensors import stop_gradient
from tests.support.model_cases import BATCH, CASES, CLASSES, al_layers, one_hot

LABELS = torch.arange(BATCH) % CLASSES


@pytest.mark.parametrize("objective", [name for name, kind in OBJECTIVES.items() if not kind.per_token])
@pytest.mark.parametrize("key", list(CASES))
def test_one_step_of_every_model_by_every_objective(key: str, objective: str) -> None:
    case = CASES[key]
    layers = al_layers(case, objective=objective)
    s, t = case.x(), layers[0].objective.first_target(LABELS, one_hot())
    decoders = [copy.deepcopy(layer.h).requires_grad_(False) for layer in layers]
    for index, layer in enumerate(layers):
        if layer.objective.needs_earlier_decoders:
            layer.objective.earlier = decoders[:index]
        before = {name: value.clone() for name, value in layer.named_parameters()}
        groups = [list(layer.associated_parameters()), list(layer.autoencoder_parameters())]
        optimizers = [torch.optim.AdamW(group, lr=0.01) for group in groups if group]
        s_out, t_out = layer(s, t)
        losses = layer.local_losses(s_out, t_out, t)

        losses.associated.backward()
        trained = {name.split(".")[0] for name, p in layer.named_parameters() if p.grad is not None}
        assert trained == {"f", "b"} | ({"h"} if objective == "greedy" else set())
        if losses.autoencoder.requires_grad:
            losses.autoencoder.backward()
        assert not {id(p) for p in groups[0]} & {id(p) for p in groups[1]}
        assert {id(p) for group in groups for p in group} == {id(p) for p in layer.parameters()}
        for optimizer in optimizers:
            optimizer.step()

        unchanged = {name for name, value in layer.named_parameters() if torch.equal(value, before[name])}
        assert not unchanged
        assert all(torch.isfinite(p).all() for p in layer.parameters())
        s, t = stop_gradient(s_out), stop_gradient(t_out)
    scores = predict([layer.eval() for layer in layers], case.x(), num_classes=CLASSES)
    assert scores.shape == (BATCH, CLASSES) and torch.isfinite(scores).all()
