"""Cost of a config's network for the planner, counted on the meta device or measured on this machine.

Operations, parameters and bytes are counted, and converted to seconds by two assumed rates of a device: operations per
second achieved in training, and memory bytes per second, for the optimizer step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.pipe import LayerSpec
from torch import Tensor, nn
from torch.nn import functional as F

from ds_al.config.associated_learning import ALConfig, al_config
from ds_al.data import load_data
from ds_al.data.config import DataConfig
from ds_al.errors import ALConfigError
from ds_al.experiment.architecture import Architecture
from ds_al.experiment.config import experiment_config, override
from ds_al.experiment.inputs import DataFacts
from ds_al.models.cost import NetworkCost, isolated, network_cost
from ds_al.partition.layer_times import measure
from ds_al.planner.work import Layer, Machines, Work
from ds_al.spec import ALLayerSpec
from ds_al.tensors import first, stop_gradient

_IMAGES: dict[str, tuple[tuple[int, ...], int]] = {
    "fashion-mnist-small": ((1, 28, 28), 10),
    "fashion-mnist": ((1, 28, 28), 10),
    "cifar10": ((3, 32, 32), 10),
    "cifar100": ((3, 32, 32), 100),
    "tiny-imagenet": ((3, 64, 64), 200),
}
_TEXTS = {"ag_news": 4, "dbpedia_14": 14, "imdb": 2, "sst2": 2}
STEP_BYTES = 28
"""Bytes per parameter of an fp32 AdamW step: reads parameter, gradient and two means, writes all but the gradient."""
_SAMPLES = 2  # micro-batch of networks that cannot run on the meta device; batch norm rejects a single sample


@dataclass(frozen=True)
class Device:
    """Assumed rates of a device, which convert counts to seconds."""

    flops: float = 10e12
    """Operations per second achieved in training, not the peak of a data sheet."""
    memory_bytes_per_second: float = 500e9

    @property
    def says(self) -> str:
        """Description for display."""
        return f"{self.flops / 1e12:g} TFLOP/s and {self.memory_bytes_per_second / 1e9:g} GB/s of memory (assumed)"


@dataclass(frozen=True)
class PlannedNetwork:
    """Network of a config, in AL form and as backprop twin."""

    al: Sequence[ALLayerSpec]
    twin: Sequence[LayerSpec]
    facts: DataFacts
    micro_batch: int
    """Samples per micro-batch."""
    config: ALConfig

    @classmethod
    def of(cls, config: Mapping[str, Any], *, layers: int | None = None) -> PlannedNetwork:
        """Builds the network of a config for ``run/train.py``. A data set that is not known by name is loaded.

        Args:
            config: the config.
            layers: number of AL layers, K, instead of the config's.

        Raises:
            ALConfigError: a block is missing, or has a key or value that training would refuse.
        """
        if layers is not None:
            model = experiment_config(config).model
            place = "options" if "num_layers" in model.options else "al_options"
            config = override(dict(config), [f"experiment.model.{place}.num_layers={layers}"])
        experiment, block = experiment_config(config), al_config(config)
        size = config.get("train_micro_batch_size_per_gpu")
        if not isinstance(size, int) or size < 1:
            raise ALConfigError(f'"train_micro_batch_size_per_gpu": got {size!r}, expected a whole number from 1 on')
        facts = _known(experiment.data) or DataFacts.of(load_data(experiment.data, seed=experiment.seed))
        both = Architecture(experiment, facts)
        return cls(al=both.al_layers(), twin=both.twin_layers(), facts=facts, micro_batch=size, config=block)

    @property
    def machines(self) -> Machines:
        """Equal machines with the queue depths and steps of the config."""
        return Machines(
            queue_depth=self.config.queue_depth,
            receive_slots=self.config.receive_slots,
            steps_per_batch=self.config.steps_per_batch,
        )

    def work(self, device: Device) -> Work:
        """Returns the cost by counted operations and bytes, on a device of these rates."""
        cost = self._cost()
        seconds = self.micro_batch * cost.twin.flops / device.flops
        step = STEP_BYTES * cost.twin.parameters / device.memory_bytes_per_second
        return self._work(cost, forward=seconds / 3, backward=seconds * 2 / 3, step=step, rho=cost.rho)

    def measured(self, *, repeat: int = 5) -> Work:
        """Returns the cost measured on this machine's device: medians of repetitions after a warm-up."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        classes = len(self.facts.classes)
        layers = list(
            measure(
                lambda index: self.al[index].build(),
                layers=len(self.al),
                example=self.facts.example(self.micro_batch),
                num_classes=classes,
                device=device,
                repeat=repeat,
            )
        )
        x = self.facts.example(self.micro_batch)
        forward, backward, step = _time_twin([spec.build() for spec in self.twin], x, device=device, repeat=repeat)
        local = sum(layer.forward + layer.backward for layer in layers)
        parts = [layer.forward + layer.backward + layer.step for layer in layers]
        rho = local / (forward + backward)
        return self._work(self._cost(), forward=forward, backward=backward, step=step, rho=rho, al=parts)

    def _cost(self) -> NetworkCost:
        return network_cost(
            self.al,
            self.twin,
            shape=(self.micro_batch, *self.facts.shape),
            num_classes=len(self.facts.classes),
            dtype=self.facts.dtype,
        )

    def _work(
        self,
        cost: NetworkCost,
        *,
        forward: float,
        backward: float,
        step: float,
        rho: float,
        al: Sequence[float] | None = None,
    ) -> Work:
        sizes = self._sizes()
        blocks = [float(layer.f.flops) for layer in cost.layers]
        # Scale the blocks to the twin, which also computes gradients of all block inputs but the first, and a head.
        later = sum(blocks[1:])
        blocks[1:] = [block * (cost.twin.flops - blocks[0]) / later if later else block for block in blocks[1:]]
        bridges = [1 - layer.f.flops / layer.total.flops for layer in cost.layers]
        layers = zip(al or [layer.total.flops for layer in cost.layers], blocks, sizes.messages, bridges, strict=True)
        return Work(
            forward=forward,
            backward=backward,
            step=step,
            rho=rho,
            message_bytes=statistics.mean(sizes.messages[:-1]) if len(sizes.messages) > 1 else 0.0,
            target_bytes=sizes.target,
            parameter_bytes=4.0 * cost.twin.parameters,
            al_parameter_bytes=4.0 * cost.al.parameters,
            activation_bytes=sizes.twin_held,
            al_activation_bytes=sizes.al_held,
            layers=tuple(Layer(*each) for each in layers),
        )

    def _sizes(self) -> _Sizes:
        try:
            return _sizes(self, "meta", self.micro_batch)
        except Exception:  # any error of an operation that needs values
            return _sizes(self, "cpu", _SAMPLES)


@dataclass(frozen=True)
class _Sizes:
    """Sizes of a network in bytes per micro-batch."""

    messages: list[float]
    target: float
    al_held: float
    twin_held: float


def _sizes(network: PlannedNetwork, device: str, samples: int) -> _Sizes:
    scale = network.micro_batch / samples
    messages, targets, al_held = [], [0.0], 0
    with isolated(device):
        shape = (samples, *network.facts.shape)
        x = torch.ones(shape, dtype=network.facts.dtype)
        labels = torch.zeros(samples, dtype=torch.int64)
        s: Any = x
        t: Any = None
        for spec in network.al:
            layer = spec.build().train()
            if t is None:
                t = layer.objective.first_target(labels, torch.ones(samples, len(network.facts.classes)))
            with saved_bytes(layer.parameters()) as held:
                s_out, t_out = layer(s, t)
                losses = layer.local_losses(s_out, t_out, t)
            al_held += held()
            del losses
            s, t = stop_gradient(s_out), stop_gradient(t_out)
            messages.append(scale * _bytes(s))
            targets.append(scale * _bytes(t))
        modules = [spec.build().train() for spec in network.twin]
        with saved_bytes(parameter for module in modules for parameter in module.parameters()) as held:
            value: Any = x
            for module in modules:
                value = module(value)
        return _Sizes(messages, max(targets[1:-1], default=0.0), scale * al_held, scale * held())


@contextmanager
def saved_bytes(exclude: Any) -> Iterator[Callable[[], int]]:
    """Counts the bytes that autograd saves inside, each storage once; unlike ActivationMeter also on the meta device.

    Args:
        exclude: tensors that do not count.
    """
    excluded = {_identity(tensor) for tensor in exclude}
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _identity(tensor) not in excluded:
            held[_identity(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def _identity(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(value: Any) -> int:
    parts = value if isinstance(value, tuple) else (value,)
    return sum(part.numel() * part.element_size() for part in parts)


def _known(data: DataConfig) -> DataFacts | None:
    """Returns the facts of a data set known by name, with texts of full length; ``None`` for others."""
    if data.path is not None:
        return None
    if data.name in _IMAGES:
        (channels, *size), classes = _IMAGES[data.name]
        shape = (channels, *([data.image_size] * 2 if data.image_size else size))
        return _facts("image", shape, classes, vocabulary=None)
    if data.name in _TEXTS and data.tokenizer == "words":
        return _facts("text", (data.max_length,), _TEXTS[data.name], vocabulary=data.vocab_size)
    return None


def _facts(kind: Any, shape: tuple[int, ...], classes: int, *, vocabulary: int | None) -> DataFacts:
    return DataFacts(
        kind=kind,
        classes=[str(number) for number in range(classes)],
        shape=shape,
        vocab_size=vocabulary,
        padding_id=None if vocabulary is None else 0,
        varying=False,
        sizes={},
    )


def _time_twin(
    modules: Sequence[nn.Module], example: Any, *, device: torch.device, repeat: int
) -> tuple[float, float, float]:
    """Measures median seconds of the twin's forward, backward and AdamW step on one micro-batch."""
    chain = nn.ModuleList(modules).to(device).train()
    x = tuple(part.to(device) for part in example) if isinstance(example, tuple) else example.to(device)
    labels = torch.zeros(len(first(x)), dtype=torch.int64, device=device)
    optimizer = torch.optim.AdamW(chain.parameters(), lr=0.0)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    times = []
    for _ in range(repeat + 2):
        marks = [now()]
        value: Any = x
        for module in chain:
            value = module(value)
        marks.append(now())
        F.cross_entropy(value, labels).backward()
        marks.append(now())
        optimizer.step()
        optimizer.zero_grad()
        marks.append(now())
        times.append([b - a for a, b in zip(marks, marks[1:], strict=False)])
    forward, backward, step = (statistics.median(column) for column in zip(*times[2:], strict=True))
    return forward, backward, step
