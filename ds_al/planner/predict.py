"""Predicts time, bubble, memory and traffic of every method for a network partitioned into P stages.

Symbols: P stages, M micro-batches per batch; F, B seconds of the twin's forward and backward of one micro-batch
through the whole network; u seconds of one optimizer step of the whole network; rho the ratio of the AL form's compute
to the twin's.

Methods with a schedule in ds_al are simulated. The times of three methods that it does not run are published formulas:

    bp_interleaved  M (F + B) / P + (P - 1) (F + B) / (P v) + u / P    v = 2 chunks a stage; Narayanan et al., SC 2021,
                                                                       arXiv 2104.04473, section 2.2
    bp_zero_bubble  M (F + B) / P + u / P                              ZB-2P, where F = B_input = B_weights; Qi et al.,
                                                                       ICLR 2024, arXiv 2401.10241, section 2
    bp_dp           ceil(M / P) (F + B) + u + excess of a ring         2 (P - 1) / P of the gradients, in 2 (P - 1)
                    all-reduce over one backward                       messages; Patarasu & Yuan, JPDC 2009

The first two formulas neglect messages. Every synchronous pipeline needs them, so the prediction is at least the
transfer time of the busiest link, and at least the round trip of the last micro-batch: its activations to the last
stage, and its gradients back. Both are lower bounds: these methods may be slower than predicted, not faster. The same
holds for data parallel training, whose all-reduce is assumed to overlap with a backward as much as possible.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from ds_al.planner.simulator import StageCost, stage_ends
from ds_al.planner.work import Machines, Work

AL = ("streaming", "forward_first", "parallel_backward", "sequential")
SIMULATED = (*AL, "bp_1f1b", "bp_gpipe", "bp_naive")
"""Methods whose schedules are simulated."""
BY_FORMULA = ("bp_interleaved", "bp_zero_bubble", "bp_dp")
"""Methods predicted by formula."""
METHODS = (*SIMULATED, *BY_FORMULA)
COMPARED = ("streaming", "forward_first", "bp_1f1b", "bp_gpipe", *BY_FORMULA)
"""Methods compared for advice: the others are never the fastest."""
_SERIAL = ("parallel_backward", "sequential", "bp_naive")  # micro-batches do not overlap
_CHUNKS = 2  # per stage of an interleaved pipeline
_STATES = 4  # tensors per parameter: itself, its gradient, AdamW's two running means


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
    graphs: int
    """Peak number of micro-batches whose activations a stage holds for backward."""
    memory_bytes: float
    """Peak memory of a stage: parameters, gradients, AdamW's state, activations, messages."""
    bytes_per_batch: float
    """Bytes sent to its neighbours by the stage that sends most, or by one replica to the others."""


def predict(
    method: str, work: Work, *, stages: int, micro_batches: int, machines: Machines | None = None
) -> Prediction:
    """Predicts one method.

    Args:
        method: a name of :data:`METHODS`.
        work: cost of the network.
        stages: number of stages, P; for ``bp_dp`` of replicas.
        micro_batches: micro-batches per batch, M.
        machines: machines of the stages; by default equal machines and messages without cost.

    Raises:
        ValueError: the method is unknown, a number is less than 1, the number of links or speeds does not match, or
            jitter is given for a method predicted by formula.
    """
    if method not in METHODS:
        raise ValueError(f"got method {method!r}: expected one of {', '.join(METHODS)}")
    if stages < 1 or micro_batches < 1:
        raise ValueError(f"got {stages} stages and {micro_batches} micro-batches: expected 1 or more of each")
    machines = machines or Machines()
    if method in SIMULATED:
        return _simulated(method, work, stages, micro_batches, machines)
    if machines.jitter is not None:
        raise ValueError(f"{method} is known by its formula, which knows no jitter: expected one of {SIMULATED}")
    return _by_formula(method, work, stages, micro_batches, machines)


def grid(
    work: Work,
    *,
    stages: list[int],
    micro_batches: list[int],
    machines: Machines | None = None,
    methods: tuple[str, ...] = COMPARED,
) -> Iterator[Prediction]:
    """Yields predictions of all methods for every number of stages and of micro-batches."""
    for p in stages:
        for m in micro_batches:
            for method in methods:
                yield predict(method, work, stages=p, micro_batches=m, machines=machines)


def _simulated(method: str, work: Work, stages: int, micro_batches: int, machines: Machines) -> Prediction:
    local = method in AL
    shares, sizes = work.shares(stages, local=local)
    scale = work.rho if local else 1.0
    costs = [
        StageCost(
            work.forward * scale * share / speed, work.backward * scale * share / speed, work.step * share / speed
        )
        for share, speed in zip(shares, machines.each_speed(stages), strict=True)
    ]
    sizes = [size + (work.target_bytes if local else 0.0) for size in sizes]
    times = _seconds(method, costs, sizes, micro_batches, machines)
    steps = (machines.steps_per_batch or micro_batches) if local else 1
    mean = machines.jitter.mean if machines.jitter else 1.0
    busy = np.array([micro_batches * mean * (cost.forward + cost.backward) + steps * cost.step for cost in costs])
    graphs = {"bp_1f1b": min(stages, micro_batches), "bp_gpipe": micro_batches}.get(method, 1)
    directions = 1 if local else 2
    return _prediction(
        method,
        work,
        stages,
        micro_batches,
        seconds=float(times.mean()),
        spread=float(times.std()),
        busy=busy,
        graphs=graphs,
        messages=(machines.queue_depth + machines.receive_slots) if local and stages > 1 else 0,
        sent=micro_batches * directions * max(sizes, default=0.0),
    )


def _seconds(
    method: str, costs: list[StageCost], sizes: list[float], micro_batches: int, machines: Machines
) -> np.ndarray:
    """Returns seconds per batch, ``(R,)``: the time of one more batch once the pipeline is full."""
    stages = len(costs)
    links = machines.each_link(stages)
    # All batches that drain the pipeline take equally long; with jitter the result is the mean of several.
    batches = 3 if method == "streaming" else 2
    run = partial(
        stage_ends,
        method,
        costs,
        steps_per_batch=machines.steps_per_batch,
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
        first = 1 + (-(-machines.settled // micro_batches) if method == "streaming" else 0)
        batches = 2 * first + 1
        shape = (stages, micro_batches * batches, machines.repeat)
        factors = machines.jitter.sample(shape, seed=machines.seed)
    ends = run(micro_batches=micro_batches, batches=batches, factors=factors).max(axis=0)
    return (ends[-1] - ends[first - 1]) / (batches - first)


def _last_batch(ends: np.ndarray) -> np.ndarray:
    by_batch = ends.max(axis=0)
    return by_batch[-1] - by_batch[-2]


def _by_formula(method: str, work: Work, stages: int, micro_batches: int, machines: Machines) -> Prediction:
    p, m = stages, micro_batches
    if method == "bp_dp":
        return _data_parallel(work, p, m, machines)
    shares, sizes = work.shares(p, local=False)
    links = machines.each_link(p)
    times = np.array(shares) / np.array(machines.each_speed(p))  # of each stage, as a share of the whole network's
    transfers = [size / link.bytes_per_second for size, link in zip(sizes, links, strict=True)]
    chunks = _CHUNKS if method == "bp_interleaved" else 1
    pace = (work.forward + work.backward) * times
    formula = (m + ((p - 1) / chunks if chunks > 1 else 0)) * pace.max()  # the slowest stage sets the pace
    busiest_link = m * chunks * max(transfers, default=0.0)
    # The last micro-batch starts after the other forwards of the first chunk; its gradients return to the first stage.
    started = (m - 1) * work.forward * times[0] / chunks
    hops = chunks * sum(transfer + link.latency for transfer, link in zip(transfers, links, strict=True))
    round_trip = started + (work.forward + work.backward / 2) * times.sum() + 2 * hops
    step = work.step * times
    return _prediction(
        method,
        work,
        p,
        m,
        seconds=float(max(formula, busiest_link, round_trip) + step.max()),
        busy=m * pace + step,
        graphs=min(p + (p - 1) // _CHUNKS if method == "bp_interleaved" else 2 * p, m),
        sent=2 * m * chunks * max(sizes, default=0.0),
    )


def _data_parallel(work: Work, replicas: int, micro_batches: int, machines: Machines) -> Prediction:
    p, slowest = replicas, min(machines.each_speed(replicas))
    links = machines.each_link(p)
    sent = 2 * (p - 1) / p * work.parameter_bytes
    exchange = max((sent / link.bytes_per_second + 2 * (p - 1) * link.latency for link in links), default=0.0)
    own = -(-micro_batches // p)
    busy = own * (work.forward + work.backward) + work.step
    exposed = max(exchange - work.backward / slowest, 0.0)
    return _prediction(
        "bp_dp",
        work,
        1,
        micro_batches,
        replicas=p,
        seconds=busy / slowest + exposed,
        busy=np.array([busy / speed for speed in machines.each_speed(p)]),
        graphs=1,
        sent=sent,
    )


def _prediction(
    method: str,
    work: Work,
    stages: int,
    micro_batches: int,
    *,
    seconds: float,
    busy: np.ndarray,
    graphs: int,
    sent: float,
    spread: float = 0.0,
    messages: int = 0,
    replicas: int = 1,
) -> Prediction:
    local = method in AL
    parameters = work.al_parameter_bytes if local else None
    activations = work.al_activation_bytes if local else None
    parameters = work.parameter_bytes if parameters is None else parameters
    activations = work.activation_bytes if activations is None else activations
    bubbles = np.maximum(1 - busy / seconds, 0.0)
    return Prediction(
        method=method,
        stages=stages * replicas,
        micro_batches=micro_batches,
        seconds=seconds,
        spread=spread,
        bubble=float(bubbles.mean()),
        bubble_least=float(bubbles.min()),
        bubble_most=float(bubbles.max()),
        graphs=graphs,
        memory_bytes=(_STATES * parameters + graphs * activations) / stages
        + messages * (work.message_bytes + work.target_bytes),
        bytes_per_batch=sent,
    )
