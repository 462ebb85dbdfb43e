"""Input of the planner: cost of a network, and properties of the machines that train it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ds_al.partition.plan import balance
from ds_al.planner.stragglers import Jitter


@dataclass(frozen=True)
class Layer:
    """Relative cost of one AL layer."""

    al: float
    """Forward and backward of the AL form, in any unit."""
    twin: float
    """Forward and backward of the twin, in any unit."""
    message_bytes: float
    """Bytes of the layer's output, per micro-batch."""
    bridge: float = 0.0
    """Share of ``al`` that b, g and h take, on the last stage of a group."""


@dataclass(frozen=True)
class Work:
    """Cost of a network, independent of machines. Symbols F, B, u, rho as in :mod:`ds_al.planner.predict`."""

    forward: float
    """F, seconds."""
    backward: float
    """B, seconds."""
    step: float = 0.0
    """u, seconds."""
    rho: float = 1.0
    weights: float = 0.5
    """Share of the backward that computes the gradients of weights."""
    message_bytes: float = 0.0
    """Bytes of an activation between stages, per micro-batch."""
    target_bytes: float = 0.0
    """Additional bytes of an AL message: codes, labels, losses."""
    parameter_bytes: float = 0.0
    """Bytes of all gradients of the twin, which data parallel training exchanges."""
    al_parameter_bytes: float | None = None
    """Bytes of all parameters of the AL form; by default those of the twin."""
    activation_bytes: float = 0.0
    """Bytes that the whole twin holds for the backward of one micro-batch."""
    al_activation_bytes: float | None = None
    """Bytes that the whole AL form holds for it; by default those of the twin."""
    layers: tuple[Layer, ...] = ()
    """Layers between which the network can be partitioned; without layers, or with more stages, stages are equal."""

    def shares(self, stages: int, *, local: bool) -> tuple[list[float], list[float]]:
        """Partitions the network into stages with the smallest maximum cost.

        Args:
            stages: number of stages, P.
            local: whether to partition the AL form instead of the twin.

        Returns:
            The share of the network's time of each stage, ``P`` numbers, and the bytes of an activation at each of the
            ``P - 1`` borders.
        """
        if not self.layers or stages > len(self.layers):
            return [1 / stages] * stages, [self.message_bytes] * (stages - 1)
        costs = [layer.al if local else layer.twin for layer in self.layers]
        bounds = balance([costs] * stages)
        parts = [sum(costs[a:b]) / sum(costs) for a, b in zip(bounds, bounds[1:], strict=False)]
        return parts, [self.layers[cut - 1].message_bytes for cut in bounds[1:-1]]


@dataclass(frozen=True)
class Link:
    """Full-duplex link between neighbouring stages."""

    bytes_per_second: float = float("inf")
    latency: float = 0.0
    """Latency in seconds."""


@dataclass(frozen=True)
class Machines:
    """Machines of the stages. By default equal, with messages that cost nothing."""

    links: Link | Sequence[Link] = Link()
    """Links between neighbours: one for all, or ``P - 1``."""
    speeds: Sequence[float] | None = None
    """Speed of each stage, relative to the device of the given times."""
    jitter: Jitter | None = None
    """Jitter of each micro-batch on each stage."""
    queue_depth: int = 2
    """Maximum number of messages that an AL stage has in flight."""
    receive_slots: int = 2
    """Number of messages that an AL stage buffers of its predecessor."""
    steps_per_batch: int | None = None
    """Optimizer steps per batch of an AL method; by default M, and 1 inside groups."""
    repeat: int = 8
    """Number of random runs to average; without jitter there is one."""
    settled: int = 256
    """Warm-up micro-batches of a pipeline with jitter that does not drain, and number of measured ones: stages that run
    ahead fill their queues slowly, and more slowly with more stages."""
    seed: int = 0

    def each_link(self, stages: int) -> list[Link]:
        """Returns the ``P - 1`` links.

        Raises:
            ValueError: the number of links does not match.
        """
        links = [self.links] * (stages - 1) if isinstance(self.links, Link) else list(self.links)
        if len(links) != stages - 1:
            raise ValueError(f"got {len(links)} links for {stages} stages: expected {stages - 1}")
        return links

    def each_speed(self, stages: int) -> list[float]:
        """Returns the P speeds.

        Raises:
            ValueError: the number of speeds does not match, or one is not above 0.
        """
        speeds = [1.0] * stages if self.speeds is None else list(self.speeds)
        if len(speeds) != stages or min(speeds) <= 0:
            raise ValueError(f"got speeds {speeds[:8]} for {stages} stages: expected {stages} numbers above 0")
        return speeds
