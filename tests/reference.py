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

Optimizers = list[tuple[torch.optim.Optimizer | None, torch.optim.Optimizer | None]]
Maker = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def train(
    layers: list[ALLayer],
    batches: Iterable[tuple[Any, Tensor]],
    *,
    num_classes: int,
    make_optimizer: Maker,
    base_seed: int,
    make_autoencoder_optimizer: Maker | None = None,
    accumulate: int = 1,
    clip: float = 0.0,
    rate: Callable[[int], float] | None = None,
) -> Optimizers:
    """Trains ``layers`` in place on micro-batches ``(x, labels)`` and returns each layer's two optimizers.

    Args:
        make_optimizer: makes the optimizer of f and b, and of g and h unless ``make_autoencoder_optimizer`` does.
        accumulate: micro-batches per optimizer step.
        clip: 2-norm of the gradients that one optimizer steps on; 0 is off.
        rate: learning rate of a micro-batch.
    """
    makers = (make_optimizer, make_autoencoder_optimizer or make_optimizer)
    optimizers: Optimizers = []
    trained: list[tuple[list[nn.Parameter], list[nn.Parameter]]] = []
    for layer in layers:
        layer.train()
        sides = (list(layer.associated_parameters()), list(layer.autoencoder_parameters()))
        trained.append(sides)
        optimizers.append(tuple(make(side) if side else None for make, side in zip(makers, sides, strict=True)))
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
            for optimizer, parameters in zip(optimizers[index], trained[index], strict=True):
                if optimizer is not None and (step + 1) % accumulate == 0:
                    if clip:
                        nn.utils.clip_grad_norm_(parameters, clip)
                    if rate:
                        for group in optimizer.param_groups:
                            group["lr"] = rate(step)
                    optimizer.step()
                    optimizer.zero_grad()
            s, t = stop_gradient(s_out), stop_gradient(t_out)
    return optimizers


def state(layers: list[ALLayer], optimizers: Optimizers) -> dict[str, Tensor]:
    """Weights, buffers and optimizer state, named as ``tests.distributed.engines.engine_state`` names them."""
    named: dict[str, Tensor] = {}
    for index, (layer, pair) in enumerate(zip(layers, optimizers, strict=True)):
        named |= {f"{index}.{name}": value.clone() for name, value in layer.state_dict().items()}
        states = {parameter: s for optimizer in pair if optimizer for parameter, s in optimizer.state.items()}
        for name, parameter in layer.named_parameters():
            for key, value in states.get(parameter, {}).items():
                if value is not None:
                    named[f"{index}.{name}/{key}"] = torch.as_tensor(value).clone()
    return named
