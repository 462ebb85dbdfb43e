"""Small tasks that a network has to learn, by a plain loop over its AL layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ds_al.layer import ALLayer, predict
from ds_al.tensors import stop_gradient


def learn(layers: list[ALLayer], batches: list[tuple[Any, Tensor]], *, classes: int, rate: float) -> None:
    """Trains layers in place by AdamW, one step per micro-batch, and leaves them in evaluation mode."""
    optimizers = [torch.optim.AdamW(layer.train().parameters(), lr=rate) for layer in layers]
    for x, labels in batches:
        s, t = x, layers[0].objective.first_target(labels, F.one_hot(labels, classes).float())
        for layer, optimizer in zip(layers, optimizers, strict=True):
            s_out, t_out = layer(s, t)
            losses = layer.local_losses(s_out, t_out, t)
            torch.autograd.backward([loss for loss in losses if loss.requires_grad])
            optimizer.step()
            optimizer.zero_grad()
            s, t = stop_gradient(s_out), stop_gradient(t_out)
    for layer in layers:
        layer.eval()


def accuracies(layers: list[ALLayer], x: Any, labels: Tensor, *, classes: int) -> list[float]:
    """Accuracy at every exit."""
    scores = (predict(layers, x, exit=number, num_classes=classes) for number in range(1, len(layers) + 1))
    return [(each.argmax(dim=1) == labels).float().mean().item() for each in scores]
