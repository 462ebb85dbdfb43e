"""Time, bubble, memory and bytes of every method for a network cut into P equal stages, on a link of some speed.

Symbols: P stages, M micro-batches per batch; F, B seconds of the twin's forward and backward of one micro-batch
through the whole network; u seconds of one optimizer step of the whole network; rho the AL form's compute over
the twin's. What has a schedule here is simulated; interleaved and zero-bubble pipelines and data parallel training
are their published formulas, which assume that messages cost nothing beside what is said.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ds_al.planner.simulator import StageCost, simulate
from ds_al.trace.analysis import span

SIMULATED = ("streaming", "forward_first", "bp_1f1b", "bp_gpipe")
"""Methods whose schedule is run."""
BY_FORMULA = ("bp_interleaved", "bp_zero_bubble", "bp_dp")
"""Methods that ds_al does not run: an engine of its own for each is elsewhere."""
METHODS = (*SIMULATED, *BY_FORMULA)
_CHUNKS = 2  # of an interleaved pipeline, per stage


@dataclass(frozen=True)
class Work:
    """What a network costs, whatever it runs on."""

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
    """Bytes of all gradients, which data parallel training exchanges."""


@dataclass(frozen=True)
class Link:
    """A connection between neighbours, full duplex."""

    bytes_per_second: float = float("inf")
    latency: float = 0.0
    """Seconds."""


@dataclass(frozen=True)
class Prediction:
    """What one method would take."""

    method: str
    stages: int
    micro_batches: int
    seconds: float
    """Per batch, once the pipeline runs."""
    bubble: float
    """Share of that in which a stage does not compute."""
    graphs: int
    """Micro-batches whose activations the fullest stage holds for backward."""
    bytes_per_batch: float
    """Sent by one stage to its neighbours, or by one replica to the others."""


def predict(method: str, work: Work, *, stages: int, micro_batches: int, link: Link | None = None) -> Prediction:
    """Predicts one method.

    Args:
        method: a name of :data:`METHODS`.
        stages: P; for ``bp_dp`` the number of replicas.
        micro_batches: M.
        link: between neighbours; by default messages cost nothing.

    Raises:
        ValueError: the method is unknown, or a number is less than 1.
    """
    if method not in METHODS:
        raise ValueError(f"got method {method!r}: expected one of {', '.join(METHODS)}")
    if stages < 1 or micro_batches < 1:
        raise ValueError(f"got {stages} stages and {micro_batches} micro-batches: expected 1 or more of each")
    link = link or Link()
    if method in SIMULATED:
        return _simulated(method, work, stages, micro_batches, link)
    return _by_formula(method, work, stages, micro_batches, link)


def break_even(work: Work, *, stages: int, link: Link | None = None, most: int = 1024) -> int | None:
    """The least M at which 1F1B is no slower than streaming; ``None`` if there is none up to ``most``.

    The more micro-batches a batch has, the less 1F1B loses to its bubble, and streaming goes on paying rho and a
    step per micro-batch.
    """

    def streaming_wins(m: int) -> bool:
        times = [
            predict(name, work, stages=stages, micro_batches=m, link=link).seconds for name in ("streaming", "bp_1f1b")
        ]
        return times[0] < times[1]

    if streaming_wins(most):
        return None
    low, high = 0, most  # streaming wins below, or at 0; 1F1B does at high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if streaming_wins(middle) else (low, middle)
    return high


def _simulated(method: str, work: Work, stages: int, micro_batches: int, link: Link) -> Prediction:
    local = method in ("streaming", "forward_first")
    scale = (work.rho if local else 1.0) / stages
    cost = StageCost(work.forward * scale, work.backward * scale, work.step / stages)
    size = work.message_bytes + (work.target_bytes if local else 0.0)
    # Two batches more than the first fill the pipeline: what the last one adds is what a batch takes.
    times = [
        _end(method, cost, stages, micro_batches, batches, latency=link.latency, transfer=size / link.bytes_per_second)
        for batches in (2, 3)
    ]
    seconds = times[1] - times[0]
    steps = micro_batches if local else 1
    busy = micro_batches * (cost.forward + cost.backward) + steps * cost.step
    directions = 1 if local else 2
    return Prediction(
        method=method,
        stages=stages,
        micro_batches=micro_batches,
        seconds=seconds,
        bubble=max(1 - busy / seconds, 0.0),
        graphs={"bp_1f1b": min(stages, micro_batches), "bp_gpipe": micro_batches}.get(method, 1),
        bytes_per_batch=micro_batches * size * directions if stages > 1 else 0.0,
    )


def _end(
    method: str, cost: StageCost, stages: int, micro_batches: int, batches: int, *, latency: float, transfer: float
) -> float:
    events = simulate(
        method, [cost] * stages, micro_batches=micro_batches, batches=batches, latency=latency, transfer=transfer
    )
    return span(events)[1]


def _by_formula(method: str, work: Work, stages: int, micro_batches: int, link: Link) -> Prediction:
    p, m = stages, micro_batches
    per_stage = (work.forward + work.backward) / p
    sent = 2 * m * work.message_bytes if p > 1 else 0.0
    if method == "bp_interleaved":
        seconds = (m + (p - 1) / _CHUNKS) * per_stage + work.step / p
        sent *= _CHUNKS
        graphs = min(p, m) + (p - 1) // _CHUNKS
    elif method == "bp_zero_bubble":
        seconds, graphs = m * per_stage + work.step / p, 2 * min(p, m)
    else:
        sent = 2 * (p - 1) / p * work.parameter_bytes
        exchange = sent / link.bytes_per_second + 2 * (p - 1) * link.latency
        seconds, graphs = -(-m // p) * (work.forward + work.backward) + exchange + work.step, 1
    busy = m * per_stage + (work.step if method == "bp_dp" else work.step / p)
    return Prediction(
        method=method,
        stages=p,
        micro_batches=m,
        seconds=seconds,
        bubble=max(1 - busy / seconds, 0.0),
        graphs=graphs,
        bytes_per_batch=sent,
    )


def grid(
    work: Work, *, stages: list[int], micro_batches: list[int], link: Link, methods: tuple[str, ...] = METHODS
) -> Iterator[Prediction]:
    """All methods on every number of stages and micro-batches."""
    for p in stages:
        for m in micro_batches:
            for method in methods:
                yield predict(method, work, stages=p, micro_batches=m, link=link)


def advice(predictions: list[Prediction], work: Work, *, even: int | None) -> str:
    """Which method to take, of predictions that share P and M, in one or two sentences.

    Args:
        even: what :func:`break_even` gave.
    """
    best = min(predictions, key=lambda each: each.seconds)
    streaming = next(each for each in predictions if each.method == "streaming")
    bp = next(each for each in predictions if each.method == "bp_1f1b")
    setting = f"P = {best.stages}, M = {best.micro_batches}, rho = {work.rho:.3g}, u = {1000 * work.step:.3g} ms"
    turn = "at any M" if even is None else f"up to M = {even - 1}" if even > 1 else "at no M"
    against = f"Streaming is {bp.seconds / streaming.seconds:.2f} times as fast as 1F1B here, and faster {turn}."
    if best.method == "streaming":
        rest = min((each for each in predictions if each.method not in ("streaming", "forward_first")), key=_seconds)
        slower = rest.seconds / best.seconds
        return f"{setting}: use streaming; the next best, {rest.method}, takes {slower:.2f} times as long. {against}"
    names = {
        "bp_dp": "data parallel training, if the model and its optimizer fit on one device",
        "bp_zero_bubble": "a zero-bubble pipeline, by a formula in which messages are free, if its memory is there",
        "bp_interleaved": "an interleaved pipeline, by a formula in which messages are free",
        "bp_1f1b": "1F1B",
        "bp_gpipe": "GPipe, if its memory is there, or 1F1B",
        "forward_first": "streaming",
    }
    slower = streaming.seconds / best.seconds
    return f"{setting}: use {names[best.method]}; streaming takes {slower:.2f} times as long. {against}"


def _seconds(prediction: Prediction) -> float:
    return prediction.seconds
