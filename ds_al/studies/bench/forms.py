"""Times both forms of a network in one process, layer by layer and alternating, to derive rho and the balance.

The two-stage measurements share these functions: the network, its micro-batches, its cuts, and the cost of each stage.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ds_al.layer import ALLayer
from ds_al.models import build_al, build_twin
from ds_al.models.cost import model_cost
from ds_al.optim.local import LocalOptimizer
from ds_al.partition.layer_times import LayerTime
from ds_al.partition.plan import balance
from ds_al.planner import StageCost
from ds_al.stage import LocalStage
from ds_al.studies.bench import workloads
from ds_al.studies.bench.scaling import cores
from ds_al.tensors import Activation, stop_gradient

_DEVICE = torch.device("cpu")


@dataclass(frozen=True)
class Network:
    """A small network of :mod:`ds_al.models`, trained by AdamW on random data."""

    model: str
    stages: int
    micro_batch: int
    """Samples."""
    dropout: float = 0.0
    """Dropout of a network of texts."""

    @property
    def options(self) -> dict[str, Any]:
        """Model options of both forms; an embedding, which takes little time, precedes the blocks that stages share."""
        options = workloads.model_options(self.model, self.stages)
        if self.model not in workloads.TEXTS:
            return options
        return {**options, "num_blocks": options["num_blocks"] + 1, "dropout": self.dropout}

    def micro_batches(self, *, count: int = 8) -> list[tuple[Tensor, Tensor]]:
        """Returns random micro-batches, created once so that their creation is not timed."""
        endless = workloads.random_batches(self.model, size=self.micro_batch)
        return list(itertools.islice(endless, count))

    def engine(self, method: str, cuts: Sequence[int]) -> Any:
        """Builds this rank's engine with the stage bounds ``[0, ..., N]``."""
        return workloads.model_engine(
            method,
            model=self.model,
            stages=self.stages,
            micro_batch=self.micro_batch,
            options=self.options,
            partition=f"cuts:{','.join(map(str, cuts[1:-1]))}",
            optimizer=workloads.ADAMW,
        )

    def rho_by_flops(self) -> float:
        """Returns the operations of the AL form relative to those of the twin."""
        x, _ = self.micro_batches(count=1)[0]
        return model_cost(self.model, shape=x.shape, dtype=x.dtype, **self.options).rho


class ALForm:
    """All AL layers of a network, each as a separate stage."""

    def __init__(self, network: Network) -> None:
        self.layers = [spec.build().train() for spec in build_al(network.model, **network.options)]
        self.classes = network.options["num_classes"]
        self._stages = [
            LocalStage([(index, layer)], stage_id=0, base_seed=0, device=_DEVICE)
            for index, layer in enumerate(self.layers)
        ]
        self._optimizers = [_local_optimizer(index, layer) for index, layer in enumerate(self.layers)]

    def once(self, x: Tensor, labels: Tensor) -> list[LayerTime]:
        """Trains every layer on a micro-batch and returns the seconds of each."""
        times = []
        s, t = self.first(x, labels)
        for stage, optimizer in zip(self._stages, self._optimizers, strict=True):
            marks = [time.perf_counter()]
            s, t = stage.forward(s, t)
            marks.append(time.perf_counter())
            stage.backward(scale=1.0)
            marks.append(time.perf_counter())
            optimizer.step()
            optimizer.zero_grad()
            marks.append(time.perf_counter())
            times.append(_between(marks))
        return times

    def first(self, x: Tensor, labels: Tensor) -> tuple[Activation, Any]:
        """Returns the input of the first layer."""
        one_hot = F.one_hot(labels, self.classes).to(torch.get_default_dtype())
        return x, self.layers[0].objective.first_target(labels, one_hot)

    @torch.no_grad()
    def inputs(self, layer: int, x: Tensor, labels: Tensor) -> tuple[Activation, Any]:
        """Returns the input of a layer for a given micro-batch."""
        s, t = self.first(x, labels)
        for each in self.layers[:layer]:
            s, t = each(s, t)
        return stop_gradient(s), stop_gradient(t)


class TwinForm:
    """All modules of a twin, with the autograd graph cut between them, as between stages."""

    def __init__(self, network: Network) -> None:
        self.modules = [spec.build().train() for spec in build_twin(network.model, **network.options)]
        self._optimizers = [_adamw(list(module.parameters())) for module in self.modules]

    def once(self, x: Tensor, labels: Tensor) -> list[LayerTime]:
        """Trains every module on a micro-batch and returns the seconds of each; the last one includes the loss."""
        forward, backward, step = [], [], []
        inputs, outputs = [], []
        s: Any = x
        for module in self.modules:
            inputs.append(s)
            start = time.perf_counter()
            output = module(s)
            if module is self.modules[-1]:
                output = F.cross_entropy(output, labels)
            forward.append(time.perf_counter() - start)
            outputs.append(output)
            s = _leaves(output)
        gradient: Tensor | None = None
        for output, source in zip(reversed(outputs), reversed(inputs), strict=True):
            start = time.perf_counter()
            (output if isinstance(output, Tensor) else output[0]).backward(gradient)
            backward.append(time.perf_counter() - start)
            gradient = (source if isinstance(source, Tensor) else source[0]).grad
        for optimizer in self._optimizers:
            start = time.perf_counter()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
            step.append(time.perf_counter() - start)
        return [LayerTime(*each) for each in zip(forward, reversed(backward), step, strict=True)]


def time_forms(network: Network, *, repeat: int) -> Iterator[tuple[list[LayerTime], list[LayerTime]]]:
    """Trains both forms alternately after a warm-up; yields the seconds of every AL layer and every twin module."""
    al, twin = ALForm(network), TwinForm(network)
    batches = itertools.cycle(network.micro_batches())
    for number, (x, labels) in enumerate(itertools.islice(batches, repeat + 3)):
        forms: list[Callable[..., list[LayerTime]]] = [al.once, twin.once]
        order = forms if number % 2 else forms[::-1]
        seconds = {form: form(x, labels) for form in order}
        if number >= 3:
            yield seconds[al.once], seconds[twin.once]


def medians(repetitions: Sequence[Sequence[LayerTime]]) -> list[LayerTime]:
    """Returns the median times of each layer over the repetitions."""
    names = ("forward", "backward", "step")
    return [
        LayerTime(*(statistics.median(getattr(time, name) for time in layer) for name in names))
        for layer in zip(*repetitions, strict=True)
    ]


def best_cuts(times: Sequence[LayerTime], *, stages: int) -> list[int]:
    """Returns the bounds ``[0, ..., N]`` that minimize the time of the slowest stage."""
    return balance([[each.cost() for each in times]] * stages)


def stage_costs(times: Sequence[LayerTime], cuts: Sequence[int]) -> list[StageCost]:
    """Returns the seconds of each stage from those of its layers."""
    stages = [times[start:stop] for start, stop in itertools.pairwise(cuts)]
    return [
        StageCost(sum(t.forward for t in own), sum(t.backward for t in own), sum(t.step for t in own)) for own in stages
    ]


def _between(marks: Sequence[float]) -> LayerTime:
    forward, backward, step = (end - start for start, end in itertools.pairwise(marks))
    return LayerTime(forward, backward, step)


def _local_optimizer(index: int, layer: ALLayer) -> LocalOptimizer:
    def adamw(groups: Any) -> torch.optim.Optimizer:
        optimizer = _adamw(groups)
        assert optimizer is not None
        return optimizer

    return LocalOptimizer([(index, layer)], associated=adamw, autoencoder=adamw)


def _adamw(parameters: Sequence[nn.Parameter | Mapping[str, Any]]) -> torch.optim.Optimizer | None:
    return torch.optim.AdamW(parameters, lr=workloads.ADAMW["params"]["lr"]) if parameters else None  # type: ignore[arg-type]


def _leaves(s: Activation) -> Activation:
    """Returns detached copies that require gradients where their dtype allows it."""
    if isinstance(s, Tensor):
        return s.detach().requires_grad_(s.is_floating_point())
    return tuple(part.detach().requires_grad_(part.is_floating_point()) for part in s)


def seconds_per_micro_batch(network: Network) -> float:
    """Returns the seconds of an AL micro-batch in this process, for estimates."""
    with torch.random.fork_rng(devices=[]):
        return min(sum(layer.cost() for layer in al) for al, _ in time_forms(network, repeat=2))


def networks_on_two_stages(models: Sequence[str], *, micro_batch: int, dropout: float = 0.0) -> list[Network]:
    """Returns the networks for the two-stage measurements; ``dropout`` is that of networks of texts.

    Raises:
        ValueError: this machine has one core, or no network of texts has the dropout.
    """
    if dropout and not set(models) & set(workloads.TEXTS):
        raise ValueError(f"got dropout {dropout:g} for {', '.join(models)}: networks of texts alone have it")
    if cores() < 2:
        raise ValueError(f"got {cores()} core: two stages of real maths need one each")
    return [Network(name, stages=2, micro_batch=micro_batch, dropout=dropout) for name in models]


def estimated_seconds(networks: Sequence[Network], micro_batches: int) -> float:
    """Estimates the seconds for this number of micro-batches on two stages per network, including rank start-up."""
    return sum(30 + micro_batches * seconds_per_micro_batch(network) / 2 for network in networks)
