"""What a planner must know of a network and of the machines that are to train it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ds_al.partition.plan import balance
from ds_al.planner.stragglers import Jitter


@dataclass(frozen=True)
class Layer:
    """One AL layer's part of a network."""

    al: float
    """Of the AL form's forward and backward."""
    twin: float
    """Of the twin's."""
    message_bytes: float
    """Of its output, per micro-batch."""


@dataclass(frozen=True)
class Work:
    """What a network costs, whatever it runs on. Symbols: F, B, u, rho as in :mod:`ds_al.planner.predict`."""

    forward: float
    """F, seconds."""
    backward: float
    """B, seconds."""
    step: float = 0.0
    """u, seconds."""
    rho: float = 1.0
    message_bytes: float = 0.0
    """Bytes of an activation between stages, per micro-batch."""
    target_bytes: float = 0.0
    """Bytes that an AL message has beside it: codes, labels, losses."""
    parameter_bytes: float = 0.0
    """Bytes of all gradients of the twin, which data parallel training exchanges."""
    al_parameter_bytes: float | None = None
    """Bytes of all parameters of the AL form; by default those of the twin."""
    activation_bytes: float = 0.0
    """Bytes that the whole twin holds for the backward pass of one micro-batch."""
    al_activation_bytes: float | None = None
    """The same of the AL form; by default that of the twin."""
    layers: tuple[Layer, ...] = ()
    """Where cuts can be made; without them, and for more stages than layers, stages are equal."""

    def shares(self, stages: int, *, local: bool) -> tuple[list[float], list[float]]:
        """What part of the network's time each stage takes, ``P`` numbers, and the bytes of an activation at each of
        the ``P - 1`` cuts: those with the smallest slowest stage.

        Args:
            local: of the AL form, not of the twin.
        """
        if not self.layers or stages > len(self.layers):
            return [1 / stages] * stages, [self.message_bytes] * (stages - 1)
        costs = [layer.al if local else layer.twin for layer in self.layers]
        bounds = balance([costs] * stages)
        parts = [sum(costs[a:b]) / sum(costs) for a, b in zip(bounds, bounds[1:], strict=False)]
        return parts, [self.layers[cut - 1].message_bytes for cut in bounds[1:-1]]


@dataclass(frozen=True)
class Link:
    """A connection between neighbours, full duplex."""

    bytes_per_second: float = float("inf")
    latency: float = 0.0
    """Seconds."""


@dataclass(frozen=True)
class Machines:
    """What the stages run on. By default: equal machines, messages for nothing."""

    links: Link | Sequence[Link] = Link()
    """Between neighbours: one for all, or ``P - 1``."""
    speeds: Sequence[float] | None = None
    """Of each stage, relative to the one whose times are given."""
    jitter: Jitter | None = None
    """Of each micro-batch on each stage."""
    queue_depth: int = 2
    """Messages that an AL stage may have under way."""
    receive_slots: int = 2
    """Messages that an AL stage holds of its predecessor."""
    steps_per_batch: int | None = None
    """Optimizer steps per batch of an AL method; by default M."""
    repeat: int = 8
    """Random runs, of which the mean is taken; without jitter one is enough."""
    settled: int = 256
    """Micro-batches after which a pipeline with jitter that does not drain counts, for as many again: stages that run
    ahead fill their queues slowly, the more stages the more slowly."""
    seed: int = 0

    def each_link(self, stages: int) -> list[Link]:
        """``P - 1`` of them.

        Raises:
            ValueError: there are others than that.
        """
        links = [self.links] * (stages - 1) if isinstance(self.links, Link) else list(self.links)
        if len(links) != stages - 1:
            raise ValueError(f"got {len(links)} links for {stages} stages: expected {stages - 1}")
        return links

    def each_speed(self, stages: int) -> list[float]:
        """P of them.

        Raises:
            ValueError: there are others than that, or one is not above 0.
        """
        speeds = [1.0] * stages if self.speeds is None else list(self.speeds)
        if len(speeds) != stages or min(speeds) <= 0:
            raise ValueError(f"got speeds {speeds[:8]} for {stages} stages: expected {stages} numbers above 0")
        return speeds
