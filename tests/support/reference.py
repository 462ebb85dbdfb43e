"""The oracle: associated learning as a plain Python loop in one process, with no engine and no DeepSpeed.

Layer by layer: forward, both losses, backward, both optimizers. Weights, optimizer state and buffers of
every other way to train must equal what this leaves, bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ds_al.layer import ALLayer, seed_layer
from ds_al.tensors import stop_gradient

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
    dtype: torch.dtype | None = None,
    loss_scale: float = 1.0,
    replicas: int = 1,
) -> Optimizers:
    """Trains ``layers`` in place on micro-batches ``(x, labels)`` and returns each layer's two optimizers.

    Args:
        make_optimizer: makes the optimizer of f and b, and of g and h unless ``make_autoencoder_optimizer`` does.
        accumulate: micro-batches per optimizer step.
        clip: 2-norm of the gradients that one optimizer steps on; 0 is off.
        rate: learning rate of a micro-batch.
        dtype: what layers compute in, with masters in float32: the layers are given back with their masters as
            weights, as a checkpoint has them.
        loss_scale: by which losses are multiplied before backward, and masters' gradients divided after it.
        replicas: number of sums of gradients, of which the mean is stepped on: micro-batch m is in sum m % replicas. A
            step takes ``accumulate`` micro-batches of each.
    """
    makers = (make_optimizer, make_autoencoder_optimizer or make_optimizer)
    optimizers: Optimizers = []
    low: list[ALLayer] = []
    trained: list[tuple[list[nn.Parameter], list[nn.Parameter]]] = []
    of_replicas: dict[nn.Parameter, list[Any]] = {}
    for layer in layers:
        layer.train()
        low.append(lowered(copy.deepcopy(layer), dtype) if dtype else layer)
        sides = (list(layer.associated_parameters()), list(layer.autoencoder_parameters()))
        trained.append(sides)
        optimizers.append(tuple(make(side) if side else None for make, side in zip(makers, sides, strict=True)))
    for step, (x, labels) in enumerate(batches):
        s = x.to(dtype) if dtype and x.is_floating_point() else x
        t = nn.functional.one_hot(labels, num_classes).to(dtype or torch.float32)
        for index, layer in enumerate(low):
            seed_layer(base_seed, layer=index, step=step, part=0)
            s_out = layer.f(s)
            t_out = layer.g(t)
            seed_layer(base_seed, layer=index, step=step, part=1)
            associated = layer.associated_loss(layer.b(layer.reduce(s_out)), t_out.detach())
            autoencoder = layer.autoencoder_loss(layer.h(t_out), t)
            ((associated + autoencoder) * (loss_scale / accumulate)).backward()
            for weight, master in zip(layer.parameters(), layers[index].parameters(), strict=True):
                if dtype and weight.grad is not None:
                    gradient = weight.grad.float() / loss_scale
                    master.grad = gradient if master.grad is None else master.grad + gradient
                    weight.grad = None
            steps = (step + 1) % (accumulate * replicas) == 0
            if replicas > 1:
                for parameter in layers[index].parameters():
                    sums = of_replicas.setdefault(parameter, [None] * replicas)
                    sums[step % replicas], parameter.grad = parameter.grad, sums[(step + 1) % replicas]
                    if steps and sums[0] is not None:
                        parameter.grad = sum(sums[1:], sums[0]) / replicas
                        del of_replicas[parameter]
            for optimizer, parameters in zip(optimizers[index], trained[index], strict=True):
                if optimizer is not None and steps:
                    if clip:
                        nn.utils.clip_grad_norm_(parameters, clip)
                    if rate:
                        for group in optimizer.param_groups:
                            group["lr"] = rate(step)
                    optimizer.step()
                    optimizer.zero_grad()
            if dtype:
                with torch.no_grad():
                    for weight, master in zip(layer.parameters(), layers[index].parameters(), strict=True):
                        weight.copy_(master)
            s, t = stop_gradient(s_out), stop_gradient(t_out)
    for layer, computing in zip(layers, low, strict=True):
        for buffer, value in zip(layer.buffers(), computing.buffers(), strict=True):
            buffer.copy_(value)
    return optimizers


def lowered(layer: ALLayer, dtype: torch.dtype) -> ALLayer:
    """Casts a layer but for batch norm, which computes in float32 whatever it gets."""
    for part in layer.modules():
        if not isinstance(part, nn.modules.batchnorm._BatchNorm):
            for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
                if tensor.is_floating_point():
                    tensor.data = tensor.data.to(dtype)
    return layer


def state(layers: list[ALLayer], optimizers: Optimizers) -> dict[str, Tensor]:
    """Weights, buffers and optimizer state, named as ``tests.support.engines.engine_state`` names them."""
    named: dict[str, Tensor] = {}
    for index, (layer, pair) in enumerate(zip(layers, optimizers, strict=True)):
        named |= {f"{index}.{name}": value.clone() for name, value in layer.state_dict().items()}
        states = {parameter: s for optimizer in pair if optimizer for parameter, s in optimizer.state.items()}
        for name, parameter in layer.named_parameters():
            for key, value in states.get(parameter, {}).items():
                if value is not None:
                    named[f"{index}.{name}/{key}"] = torch.as_tensor(value).clone()
    return named
