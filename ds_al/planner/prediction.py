"""The result of the planner for one method, and the time per batch once a pipeline is full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from ds_al.planner.simulator import StageCost, stage_ends
from ds_al.planner.work import Machines

STATES = 4
"""Tensors per parameter: itself, its gradient, AdamW's two running means."""
_SERIAL = ("parallel_backward", "sequential", "bp_naive")  # micro-batches do not overlap
_DRAINS = (*_SERIAL, "forward_first", "bp_1f1b", "bp_gpipe")  # all batches take equally long


@dataclass(frozen=True)
class Prediction:
    """Predicted time, bubble, memory and traffic of one method."""

    method: str
    stages: int
    micro_batches: int
    seconds: float
    """Seconds per batch in steady state."""
    spread: float
    """Standard deviation of ``seconds`` over random runs; 0 without jitter."""
    bubble: float
    """Share of the time in which a stage does not compute, mean of all stages."""
    bubble_least: float
    """Bubble of the busiest stage."""
    bubble_most: float
    """Bubble of the least busy stage."""
    graphs: float
    """Peak number of micro-batches whose activations a stage holds for backward."""
    memory_bytes: float
    """Peak memory of a stage: parameters, gradients, AdamW's state, activations, messages."""
    bytes_per_batch: float
    """Bytes sent to its neighbours by the stage that sends most, or by one replica to the others."""
    layers: int | None = None
    """K, the number of AL layers; ``None`` for back-propagation."""
    schedule: str = ""
    """Schedule inside a group, of the method ``groups``."""

    @property
    def name(self) -> str:
        """Method, and K and the schedule of groups."""
        return f"K = {self.layers}, {self.schedule}" if self.schedule else self.method


def seconds_per_batch(
    method: str,
    costs: Sequence[StageCost],
    sizes: Sequence[float],
    micro_batches: int,
    machines: Machines,
    *,
    groups: Sequence[int] = (),
) -> np.ndarray:
    """Simulates the time of one more batch once the pipeline is full.

    Args:
        method: a method or schedule that :func:`~ds_al.planner.simulator.stage_ends` knows.
        costs: cost of each stage, ``P``.
        sizes: bytes of a message at each border, ``P - 1``.
        micro_batches: M.
        machines: links, queues, jitter.
        groups: number of stages of each group.

    Returns:
        Seconds per batch, ``(R,)``.
    """
    stages = len(costs)
    links = machines.each_link(stages)
    # With jitter the result is the mean of several batches.
    batches = 2 if method in _DRAINS else 3
    run = partial(
        stage_ends,
        method,
        costs,
        steps_per_batch=machines.steps_per_batch,
        groups=groups,
        queue_depth=machines.queue_depth,
        receive_slots=machines.receive_slots,
        latency=[link.latency for link in links],
        transfer=[size / link.bytes_per_second for size, link in zip(sizes, links, strict=True)],
    )
    if machines.jitter is None and method in _SERIAL and machines.steps_per_batch is None and micro_batches > 2:
        # Micro-batches that do not overlap take equally long.
        one, two = (_last_batch(run(micro_batches=m, batches=batches)) for m in (1, 2))
        return one + (micro_batches - 1) * (two - one)
    factors, first = None, batches - 1
    if machines.jitter is not None:
        first = 1 if method in _DRAINS else 1 + -(-machines.settled // micro_batches)
        batches = 2 * first + 1
        shape = (stages, micro_batches * batches, machines.repeat)
        factors = machines.jitter.sample(shape, seed=machines.seed)
    ends = run(micro_batches=micro_batches, batches=batches, factors=factors).max(axis=0)
    return (ends[-1] - ends[first - 1]) / (batches - first)


def _last_batch(ends: np.ndarray) -> np.ndarray:
    by_batch = ends.max(axis=0)
    return by_batch[-1] - by_batch[-2]
