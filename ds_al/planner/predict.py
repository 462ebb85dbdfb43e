"""Predicts time, bubble, memory and traffic of every method for a network partitioned into P stages.

Symbols: P stages, M micro-batches per batch; F, B seconds of the twin's forward and backward of one micro-batch
through the whole network; u seconds of one optimizer step of the whole network; rho the ratio of the AL form's compute
to the twin's.

Methods with a schedule in ds_al are simulated; K layers on P > K stages: :mod:`ds_al.planner.groups`. The times of the
other methods are formulas:

    bp_interleaved  M (F + B) / P + (P - 1) (F + B) / (P v) + u / P    v = 2 chunks a stage; Narayanan et al., SC 2021,
                                                                       arXiv 2104.04473, section 2.2
    bp_dualpipev    M (F + B) / P + (P - 1) (F / 2 + B) / P            DeepSpeed's DualPipeVSchedule, whose backward is
                      - F / (2 P) + u / P                              not split, for B >= 2 F and M >= 2 P
    bp_async        M (F + B) / P + u / P                              two versions of the weights, M >= P; Narayanan et
                                                                       al., ICML 2021, arXiv 2006.09503 (PipeDream-2BW)
    bp_dp           ceil(M / P) (F + B) + u + excess of a ring         2 (P - 1) / P of the gradients, in 2 (P - 1)
                    all-reduce over one backward                       messages; Patarasu & Yuan, JPDC 2009

The formulas of pipelines neglect messages. Every pipeline needs them, so the prediction is at least the transfer time
of the busiest link, and, of those that drain, at least the round trip of the last micro-batch: its activations to the
last stage, and its gradients back. All are lower bounds: these methods may be slower than predicted, not faster. The
same holds for data parallel training, whose all-reduce is assumed to overlap with a backward as much as possible.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ds_al.group_schedule import GROUP_SCHEDULES
from ds_al.planner.formulas import dualpipev_seconds
from ds_al.planner.groups import predict_groups, predict_zero_bubble
from ds_al.planner.prediction import STATES, Prediction, seconds_per_batch
from ds_al.planner.simulator import ZERO_BUBBLE, StageCost
from ds_al.planner.work import Machines, Work

AL = ("streaming", "forward_first", "parallel_backward", "sequential")
SIMULATED = (*AL, "bp_1f1b", "bp_gpipe", "bp_naive", *ZERO_BUBBLE)
"""Methods whose schedules are simulated."""
BY_FORMULA = ("bp_interleaved", "bp_dualpipev", "bp_async", "bp_dp")
"""Methods predicted by formula."""
METHODS = (*SIMULATED, *BY_FORMULA)
COMPARED = ("streaming", "bp_1f1b", *ZERO_BUBBLE, "bp_async", "bp_dp")
"""Methods compared for advice: the others are never the fastest."""
_CHUNKS = {"bp_interleaved": 2, "bp_dualpipev": 2}  # per stage
_STATES_ASYNC = STATES + 1  # and the weights of the step before


def predict(
    method: str, work: Work, *, stages: int, micro_batches: int, machines: Machines | None = None
) -> Prediction:
    """Predicts one method, with each AL layer on one stage or several layers on a stage.

    Args:
        method: a name of :data:`METHODS`.
        work: cost of the network.
        stages: number of stages, P; for ``bp_dp`` of replicas.
        micro_batches: micro-batches per batch, M.
        machines: machines of the stages; by default equal machines and messages without cost.

    Raises:
        ValueError: the method is unknown or needs more micro-batches, a number is less than 1, the number of links or
            speeds does not match, or jitter is given for a method predicted by formula.
    """
    if method not in METHODS:
        raise ValueError(f"got method {method!r}: expected one of {', '.join(METHODS)}")
    if stages < 1 or micro_batches < 1:
        raise ValueError(f"got {stages} stages and {micro_batches} micro-batches: expected 1 or more of each")
    machines = machines or Machines()
    if micro_batches < (least := least_micro_batches(method, stages)):
        raise ValueError(f"got {micro_batches} micro-batches: {method} on {stages} stages needs {least}")
    if method in ZERO_BUBBLE:
        return predict_zero_bubble(method, work, stages=stages, micro_batches=micro_batches, machines=machines)
    if method in SIMULATED:
        return _simulated(method, work, stages, micro_batches, machines)
    if machines.jitter is not None:
        raise ValueError(f"{method} is known by its formula, which knows no jitter: expected one of {SIMULATED}")
    return _by_formula(method, work, stages, micro_batches, machines)


def least_micro_batches(method: str, stages: int) -> int:
    """Returns the least M with which a method runs on P stages."""
    return {"bp_dualpipev": 2 * stages, "bp_async": stages}.get(method, 1)


def grid(
    work: Work,
    *,
    stages: Sequence[int],
    micro_batches: Sequence[int],
    machines: Machines | None = None,
    methods: Sequence[str] = COMPARED,
    layers: Mapping[int, Work] | None = None,
) -> Iterator[Prediction]:
    """Yields predictions of all methods for every number of stages and of micro-batches with which they run.

    Args:
        work: cost of the network.
        stages, micro_batches: values of P and M.
        machines: machines of the stages.
        methods: names of :data:`METHODS`.
        layers: cost of the network in K layers, by K; each K < P adds a prediction for every schedule inside a group.
    """
    for p in stages:
        for m in micro_batches:
            for method in methods:
                if m >= least_micro_batches(method, p):
                    own = (layers or {}).get(p, work) if method == "streaming" else work
                    yield predict(method, own, stages=p, micro_batches=m, machines=machines)
            for k, own in (layers or {}).items():
                for schedule in GROUP_SCHEDULES if k < p else ():
                    yield predict_groups(own, stages=p, layers=k, schedule=schedule, micro_batches=m, machines=machines)


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
    times = seconds_per_batch(method, costs, sizes, micro_batches, machines)
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


def _by_formula(method: str, work: Work, stages: int, micro_batches: int, machines: Machines) -> Prediction:
    p, m = stages, micro_batches
    if method == "bp_dp":
        return _data_parallel(work, p, m, machines)
    shares, sizes = work.shares(p, local=False)
    links = machines.each_link(p)
    times = np.array(shares) / np.array(machines.each_speed(p))  # of each stage, as a share of the whole network's
    transfers = [size / link.bytes_per_second for size, link in zip(sizes, links, strict=True)]
    chunks = _CHUNKS.get(method, 1)
    pace = (work.forward + work.backward) * times
    slowest = times.max()  # the slowest stage sets the pace
    fill = {
        "bp_interleaved": (p - 1) / chunks * pace.max(),
        "bp_dualpipev": dualpipev_seconds(
            stages=p, micro_batches=0, forward=work.forward * slowest, backward=work.backward * slowest
        ),
    }.get(method, 0.0)
    busiest_link = m * chunks * max(transfers, default=0.0)
    # The last micro-batch starts after the other forwards of the first chunk; its gradients return to the first stage.
    started = (m - 1) * work.forward * times[0] / chunks
    hops = chunks * sum(transfer + link.latency for transfer, link in zip(transfers, links, strict=True))
    round_trip = started + (work.forward + work.backward / 2) * times.sum() + 2 * hops
    drained = 0.0 if method == "bp_async" else round_trip
    step = work.step * times
    graphs = {"bp_interleaved": min(p + (p - 1) // 2, m), "bp_dualpipev": p + 0.5, "bp_async": min(p, m)}[method]
    return _prediction(
        method,
        work,
        p,
        m,
        seconds=float(max(m * pace.max() + fill, busiest_link, drained) + step.max()),
        busy=m * pace + step,
        graphs=graphs,
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
    graphs: float,
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
        memory_bytes=((_STATES_ASYNC if method == "bp_async" else STATES) * parameters + graphs * activations) / stages
        + messages * (work.message_bytes + work.target_bytes),
        bytes_per_batch=sent,
        layers=max(stages, len(work.layers)) if local else None,
    )
