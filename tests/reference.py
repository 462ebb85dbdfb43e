"""The oracle: associated learning as a plain Python loop in one process, with no engine and no DeepSpeed.

Layer by layer: forward, both losses, backward, both optimizers. Weights, optimizer state and buffers of
every other way to train must equal what this leaves, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ds_al.layer import ALLayer, seed_layer, stop_gradient


def train(
    layers: list[ALLayer],
    batches: Iterable[tuple[Any, Tensor]],
    *,
    num_classes: int,
    make_optimizer: Callable[..., torch.optim.Optimizer],
    base_seed: int,
    accumulate: int = 1,
    clip: float = 0.0,
) -> list[tuple[torch.optim.Optimizer | None, torch.optim.Optimizer | None]]:
    """Trains ``layers`` in place on micro-batches ``(x, labels)`` and returns each layer's two optimizers."""
    optimizers = []
    for layer in layers:
        layer.train()
        pairs = (list(layer.associated_parameters()), list(layer.autoencoder_parameters()))
        optimizers.append(tuple(make_optimizer(p) if p else None for p in pairs))
    for step, (x, labels) in enumerate(batches):
        s = x
        t = nn.functional.one_hot(labels, num_classes).float()
        for index, layer in enumerate(layers):
            seed_layer(base_seed, layer=index, step=step, part=0)
            s_out = layer.f(s)
            t_out = layer.g(t)
            seed_layer(base_seed, layer=index, step=step, part=1)
            associated = layer.associated_loss(layer.b(layer.reduce(s_out)), t_out.detach())
            autoencoder = layer.autoencoder_loss(layer.h(t_out), t)
            ((associated + autoencoder) * (1 / accumulate)).backward()
            if (step + 1) % accumulate == 0:
                for optimizer in optimizers[index]:
                    if optimizer is not None:
                        if clip:
                            nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip)
                        optimizer.step()
                        optimizer.zero_grad()
            s, t = stop_gradient(s_out), stop_gradient(t_out)
    return optimizers
