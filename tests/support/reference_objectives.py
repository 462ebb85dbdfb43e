"""The oracle of the objectives: each as a plain loop over layers in one process, from its formula alone."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ds_al.layer import ALLayer, seed_layer
from ds_al.tensors import stop_gradient

Optimizers = list[list[torch.optim.Optimizer]]


def train(
    name: str,
    layers: list[ALLayer],
    batches: Iterable[tuple[Any, Tensor]],
    *,
    num_classes: int,
    base_seed: int,
    lr: float,
    temperature: float = 0.1,
    refresh_every: int = 10,
    own_decoder: str = "frozen",
    label_smoothing: float = 0.0,
) -> Optimizers:
    """Trains ``layers`` in place by AdamW, a step per micro-batch, and returns each layer's optimizers."""
    optimizers: Optimizers = []
    smooth = functools.partial(F.cross_entropy, label_smoothing=label_smoothing)
    for layer in layers:
        layer.train()
        extra = [*layer.h.parameters()] if name == "greedy" else [*layer.objective.parameters()]
        associated = [*layer.f.parameters(), *layer.b.parameters(), *extra]
        autoencoder = [] if name == "greedy" else [*layer.g.parameters(), *layer.h.parameters()]
        optimizers.append([torch.optim.AdamW(group, lr=lr, fused=True) for group in (associated, autoencoder) if group])
    copies: list[Any] = []
    for step, (x, labels) in enumerate(batches):
        if step % refresh_every == 0:
            copies = [copy.deepcopy(layer.h).requires_grad_(False) for layer in layers]
        s, code, table = x, F.one_hot(labels, num_classes).float(), torch.eye(num_classes)
        for index, layer in enumerate(layers):
            seed_layer(base_seed, layer=index, step=step, part=0)
            s_out = layer.f(s)
            code_out = layer.g(code) if name == "decoded" else code
            table_out = layer.g(table) if name == "contrast" else table
            seed_layer(base_seed, layer=index, step=step, part=1)
            bridge = layer.b(layer.reduce(s_out))
            if name == "greedy":
                losses = [smooth(layer.h(bridge), labels)]
            elif name == "contrast":
                scale = layer.objective.log_temperature.exp()
                cosines = F.normalize(bridge, dim=1) @ F.normalize(table_out.detach(), dim=1).t()
                losses = [smooth(cosines / scale, labels), layer.autoencoder_loss(layer.h(table_out), table)]
            else:
                own = layer.h if own_decoder == "live" else copy.deepcopy(layer.h).requires_grad_(False)
                scores = own(bridge)
                for earlier in reversed(copies[:index]):
                    scores = earlier(scores)
                losses = [smooth(scores, labels), layer.autoencoder_loss(layer.h(code_out), code)]
            torch.autograd.backward(losses)
            for optimizer in optimizers[index]:
                optimizer.step()
                optimizer.zero_grad()
            s, code, table = stop_gradient(s_out), code_out.detach(), table_out.detach()
    return optimizers
