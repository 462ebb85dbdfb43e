"""Measured costs of AL layers on their own device: forward, backward and step times, and memory."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ds_al.layer import ALLayer
from ds_al.partition.part import LayerPart
from ds_al.tensors import Activation, first, stop_gradient
from ds_al.trace.meter import ActivationMeter

MakeOptimizer = Callable[[ALLayer], torch.optim.Optimizer | None]


@dataclass(frozen=True)
class LayerTime:
    """Cost of one AL layer per micro-batch, bridge and target side included: times in seconds, memory in bytes."""

    forward: float
    backward: float
    """Local losses and their backward pass."""
    step: float
    """One optimizer step of all its parameters."""
    memory: int = 0
    """Parameters, buffers, gradients, optimizer state, and the activations saved for backward of one micro-batch."""

    @property
    def u(self) -> float:
        """Step time divided by forward plus backward time."""
        return self.step / (self.forward + self.backward)

    def cost(self, steps: float = 1.0) -> float:
        """Returns the seconds per micro-batch at ``steps`` optimizer steps per micro-batch (``steps_per_batch`` /
        micro-batches)."""
        return self.forward + self.backward + steps * self.step


def adamw(layer: ALLayer) -> torch.optim.Optimizer | None:
    """Builds the default optimizer of a layer, used if the config has none."""
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-3, fused=True) if trained else None


def measure(
    build: Callable[[int], ALLayer],
    *,
    layers: int,
    example: Activation,
    num_classes: int,
    device: torch.device,
    make_optimizer: MakeOptimizer = adamw,
    repeat: int = 5,
) -> Iterator[LayerTime]:
    """Measures the layers one after the other on this rank's device; yields medians after a warm-up.

    Args:
        build: builds the layer with a given index. Each layer is freed before the next one is built.
        layers: N.
        example: a micro-batch ``x`` of the training size.
        num_classes: V.
        make_optimizer: builds the optimizer of one layer.
        repeat: number of measured iterations.
    """
    s: Any = tuple(part.to(device) for part in example) if isinstance(example, tuple) else example.to(device)
    t: Any = None
    decoders: list[nn.Module] = []
    for index in range(layers):
        layer = build(index).to(device).train()
        if layer.objective.needs_earlier_decoders and layer.ends:
            layer.objective.earlier = list(decoders)
            decoders.append(copy.deepcopy(layer.h).requires_grad_(False))
        if t is None:
            t = _first_target(layer, s, num_classes)
        optimizer = make_optimizer(layer)
        with ActivationMeter(exclude=layer.parameters()) as meter:
            _once(layer, s, t, optimizer, device)
        times = [_once(layer, s, t, optimizer, device) for _ in range(repeat + 1)][1:]
        forward, backward, step = (statistics.median(column) for column in zip(*times, strict=True))
        yield LayerTime(forward, backward, step, memory=_held(layer, optimizer) + meter.peak_bytes)
        with torch.no_grad():
            s_out, t_out = layer(s, t)
        s, t = stop_gradient(s_out), stop_gradient(t_out)
        del layer, optimizer


def _first_target(layer: ALLayer, x: Any, num_classes: int) -> Any:
    """Returns ``t_0`` of a micro-batch whose labels are all 0."""
    shape = first(x).shape[: 2 if layer.objective.per_token else 1]
    labels = torch.zeros(shape, dtype=torch.int64, device=first(x).device)
    if layer.objective.per_token:
        return layer.objective.first_target(labels, labels)
    return layer.objective.first_target(labels, F.one_hot(labels, num_classes).to(torch.get_default_dtype()))


def _once(
    layer: ALLayer, s: Any, t: Any, optimizer: torch.optim.Optimizer | None, device: torch.device
) -> tuple[float, float, float]:
    if isinstance(layer, LayerPart) and layer.run.start:
        s = _leaves(s)
    marks = [_now(device)]
    s_out, t_out = layer(s, t)
    marks.append(_now(device))
    outputs = layer.local_losses(s_out, t_out, t) if layer.ends else _tuple(s_out)
    learning: list[Tensor] = [output for output in outputs if output.requires_grad]
    if learning:
        torch.autograd.backward(learning, None if layer.ends else [torch.ones_like(output) for output in learning])
    marks.append(_now(device))
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    marks.append(_now(device))
    return marks[1] - marks[0], marks[2] - marks[1], marks[3] - marks[2]


def _tuple(s: Any) -> tuple[Tensor, ...]:
    return s if isinstance(s, tuple) else (s,)


def _leaves(s: Any) -> Any:
    """Returns ``s`` with gradients, as it arrives from the blocks of the same layer before."""
    leaves = tuple(part.detach().requires_grad_() if part.is_floating_point() else part for part in _tuple(s))
    return leaves if isinstance(s, tuple) else leaves[0]


def _held(layer: ALLayer, optimizer: torch.optim.Optimizer | None) -> int:
    state = optimizer.state.values() if optimizer is not None else ()
    tensors = [value for entry in state for value in entry.values() if isinstance(value, Tensor)]
    gradients = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    return sum(t.numel() * t.element_size() for t in (*layer.parameters(), *layer.buffers(), *gradients, *tensors))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
