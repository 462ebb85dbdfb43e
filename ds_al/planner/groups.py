"""Predicts K AL layers on P > K stages: groups of stages, with exact back-propagation inside them.

The last stage of a group also holds the bridge, g and h of its layer. A stage holds the activations of as many
micro-batches as its place in the schedule asks for. ``bp_zb_h1`` and ``bp_zb_h2`` are one group of all stages that
trains the twin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ds_al.group_schedule import GROUP_SCHEDULES
from ds_al.planner.prediction import STATES, Prediction, seconds_per_batch
from ds_al.planner.simulator import ZERO_BUBBLE, StageCost, places
from ds_al.planner.work import Layer, Machines, Work


def group_sizes(stages: int, layers: int) -> tuple[int, ...]:
    """Returns the number of stages of each of K groups, as even as possible; the larger ones are last.

    Raises:
        ValueError: there is no stage for each layer.
    """
    if not 1 <= layers <= stages:
        raise ValueError(f"got {layers} layers on {stages} stages: expected 1 to {stages} layers for groups of stages")
    bounds = [stages * i // layers for i in range(layers + 1)]
    return tuple(b - a for a, b in zip(bounds, bounds[1:], strict=False))


@dataclass(frozen=True)
class GroupedStages:
    """K layers of a network on P stages.

    Attributes:
        work: cost of the network.
        sizes: number of stages of each group.
        schedule: a name of :data:`~ds_al.group_schedule.GROUP_SCHEDULES`.
        micro_batches: M.
        machines: machines of the stages.
    """

    work: Work
    sizes: Sequence[int]
    schedule: str
    micro_batches: int
    machines: Machines

    @property
    def stages(self) -> int:
        """P."""
        return sum(self.sizes)

    def costs(self) -> list[StageCost]:
        """Returns the seconds of every stage."""
        work, found = self.work, []
        for size, layer in zip(self.sizes, self._layers(), strict=True):
            blocks = layer.al * (1 - layer.bridge) / size
            found += [blocks] * (size - 1) + [blocks + layer.al * layer.bridge]
        return [
            StageCost(
                work.forward * share / speed,
                work.backward * share / speed,
                work.step / self.stages / speed,
                work.backward * work.weights * share / speed,
            )
            for share, speed in zip(found, self.machines.each_speed(self.stages), strict=True)
        ]

    def graphs(self) -> list[int]:
        """Returns the number of micro-batches whose activations each stage holds at the peak."""
        make, steps = GROUP_SCHEDULES[self.schedule], self.machines.steps_per_batch or 1
        return [make(self.micro_batches, place, steps).num_pipe_buffers() for place in places(self.sizes)]

    def memory(self) -> list[float]:
        """Returns the bytes that each stage holds at the peak: parameters, gradients, AdamW's state; the activations of
        its micro-batches. Bridges are on the last stage of each group."""
        work, stages = self.work, self.stages
        bridge_weights = self._bridge(work.al_parameter_bytes, work.parameter_bytes)
        bridge_held = self._bridge(work.al_activation_bytes, work.activation_bytes)
        return [
            STATES * (work.parameter_bytes / stages + place.is_last * bridge_weights)
            + graphs * (work.activation_bytes / stages + place.is_last * bridge_held)
            for place, graphs in zip(places(self.sizes), self.graphs(), strict=True)
        ]

    def channels(self) -> list[float]:
        """Returns the bytes of the message buffers of each stage, beside inputs that wait for their backward: to the
        next stage and from the previous one, and of gradients inside a group (:mod:`ds_al.transport.neighbours`)."""
        message, gradient = self.work.message_bytes + self.work.target_bytes, self.work.message_bytes
        found = []
        for place, graphs in zip(places(self.sizes), self.graphs(), strict=True):
            depth, slots = (
                max(own, 2 * place.size) for own in (self.machines.queue_depth, self.machines.receive_slots)
            )
            ahead = (place.stage < self.stages - 1) * depth + (place.stage > 0) * max(slots - graphs, 0)
            back = 2 * place.size * ((not place.is_first) + (not place.is_last))
            found.append(ahead * message + back * gradient)
        return found

    def border_bytes(self) -> list[float]:
        """Returns the bytes of a message at each of the ``P - 1`` borders."""
        return [self.work.message_bytes + self.work.target_bytes] * (self.stages - 1)

    def sent(self) -> float:
        """Returns the bytes per batch of the stage that sends most: activations, and gradients inside a group."""
        back = max(self.sizes) > 1
        forward = self.stages > 1
        return self.micro_batches * (
            forward * (self.work.message_bytes + self.work.target_bytes) + back * self.work.message_bytes
        )

    def _layers(self) -> list[Layer]:
        """Returns the layers with times relative to those of the whole twin."""
        work, stages = self.work, self.stages
        if len(work.layers) == len(self.sizes):
            scale = work.rho / sum(layer.al for layer in work.layers)
            return [replace(layer, al=layer.al * scale) for layer in work.layers]
        # Equal stages: the last one of a group carries what a stage of streaming carries; one layer is the twin.
        rho = work.rho if len(self.sizes) > 1 else 1.0
        return [
            Layer((size - 1 + rho) / stages, size / stages, work.message_bytes, bridge=(rho - 1) / (size - 1 + rho))
            for size in self.sizes
        ]

    def _bridge(self, al: float | None, twin: float) -> float:
        """Returns what the bridge, g and h of one layer add to the twin's bytes."""
        more = 0.0 if al is None else max(al - twin, 0.0)
        if len(self.work.layers) == len(self.sizes):
            return more / len(self.sizes)
        return more / self.stages if len(self.sizes) > 1 else 0.0


def predict_groups(
    work: Work, *, stages: int, layers: int, schedule: str, micro_batches: int, machines: Machines | None = None
) -> Prediction:
    """Predicts K layers on P stages, one optimizer step per batch unless the machines set another number.

    Args:
        work: cost of the network, in K layers if it has layers.
        stages: number of stages, P.
        layers: number of AL layers, K, at most P.
        schedule: a name of :data:`~ds_al.group_schedule.GROUP_SCHEDULES`.
        micro_batches: micro-batches per batch, M.
        machines: machines of the stages; by default equal machines and messages without cost.

    Raises:
        ValueError: the schedule is unknown, there are more layers than stages, or a number is less than 1.
    """
    if schedule not in GROUP_SCHEDULES:
        raise ValueError(f"got schedule {schedule!r}: expected one of {', '.join(GROUP_SCHEDULES)}")
    if micro_batches < 1:
        raise ValueError(f"got {micro_batches} micro-batches: expected 1 or more")
    machines = machines or Machines()
    grouped = GroupedStages(work, group_sizes(stages, layers), schedule, micro_batches, machines)
    costs = grouped.costs()
    times = _chain(grouped) if machines.jitter else _slowest_group(grouped)
    mean = machines.jitter.mean if machines.jitter else 1.0
    steps = machines.steps_per_batch or 1
    busy = np.array([micro_batches * mean * (cost.forward + cost.backward) + steps * cost.step for cost in costs])
    bubbles = np.maximum(1 - busy / times.mean(), 0.0)
    return Prediction(
        method="groups",
        stages=stages,
        micro_batches=micro_batches,
        seconds=float(times.mean()),
        spread=float(times.std()),
        bubble=float(bubbles.mean()),
        bubble_least=float(bubbles.min()),
        bubble_most=float(bubbles.max()),
        graphs=max(grouped.graphs()),
        memory_bytes=max(map(sum, zip(grouped.memory(), grouped.channels(), strict=True))),
        bytes_per_batch=grouped.sent(),
        layers=layers,
        schedule=schedule,
    )


def _chain(grouped: GroupedStages) -> np.ndarray:
    """Simulates all groups together; returns seconds per batch, ``(R,)``."""
    return seconds_per_batch(
        grouped.schedule,
        grouped.costs(),
        grouped.border_bytes(),
        grouped.micro_batches,
        grouped.machines,
        groups=grouped.sizes,
    )


def _slowest_group(grouped: GroupedStages) -> np.ndarray:
    """Simulates each group alone, since no group waits for a later one: once the pipeline is full, the slowest group or
    link sets the pace. Returns seconds per batch, ``(1,)``."""
    costs, borders = grouped.costs(), grouped.border_bytes()
    links = grouped.machines.each_link(grouped.stages)
    periods, start = {}, 0
    for size in grouped.sizes:
        own, inside = tuple(costs[start : start + size]), slice(start, start + size - 1)
        machines = replace(grouped.machines, links=links[inside], speeds=None)
        if (own, *links[inside]) not in periods:
            periods[own, *links[inside]] = seconds_per_batch(
                grouped.schedule, own, borders[inside], grouped.micro_batches, machines, groups=(size,)
            )
        start += size
    busiest = max((size / link.bytes_per_second for size, link in zip(borders, links, strict=True)), default=0.0)
    return np.maximum(max(periods.values()), grouped.micro_batches * busiest)


def predict_zero_bubble(method: str, work: Work, *, stages: int, micro_batches: int, machines: Machines) -> Prediction:
    """Predicts back-propagation of the twin by a zero-bubble schedule, a key of
    :data:`~ds_al.planner.simulator.ZERO_BUBBLE`: one group of all stages."""
    shares, _ = work.shares(stages, local=False)
    twin = replace(work, rho=1.0, target_bytes=0.0, al_parameter_bytes=None, al_activation_bytes=None, layers=())
    once = replace(machines, steps_per_batch=1, speeds=_paces(shares, machines.each_speed(stages)))
    schedule = ZERO_BUBBLE[method]
    found = predict_groups(twin, stages=stages, layers=1, schedule=schedule, micro_batches=micro_batches, machines=once)
    held = max(GroupedStages(twin, (stages,), schedule, micro_batches, once).memory())
    return replace(found, method=method, layers=None, schedule="", memory_bytes=held)


def _paces(shares: Sequence[float], speeds: Sequence[float]) -> list[float]:
    """Returns the speeds at which equal stages take as long as stages of these shares of the network."""
    return [speed / (share * len(shares)) for share, speed in zip(shares, speeds, strict=True)]
