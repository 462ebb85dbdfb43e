"""Analysis of a recorded run: busy time and idle time by cause per stage, and the critical path."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ds_al.trace.events import COMPUTING, MESSAGES, Event

CAUSES = ("wait_input", "wait_queue", "wait_data", "wait_barrier", "wait_copies", "drained", "other")
"""Causes of idle time, fields of :class:`StageTime`."""

_WAITS = {
    "RecvActivation": "wait_input",
    "RecvGrad": "wait_input",
    "CommitP2P": "wait_input",
    "RefreshDecoders": "wait_input",
    "SendActivation": "wait_queue",
    "SendGrad": "wait_queue",
    "SendDecoders": "wait_queue",
    "LoadMicroBatch": "wait_data",
    "Barrier": "wait_barrier",
    "LossBroadcast": "wait_barrier",
    "ReduceGrads": "wait_copies",
}
_MEETINGS: dict[str, Callable[[tuple[int, int], tuple[int, int]], bool]] = {
    "Barrier": lambda one, other: one[0] == other[0],
    "LossBroadcast": lambda one, other: True,
    "ReduceGrads": lambda one, other: one[1] == other[1],
}
"""Instructions in which ranks wait for each other, and whether two (replica, stage) do."""


@dataclass(frozen=True)
class StageTime:
    """Busy and idle time of one stage, as shares of the run's time. ``busy`` and all causes add up to 1."""

    stage: int
    span: float
    """Seconds of the run: from the start of the first computation to the end of the last one, on any stage."""
    busy: float
    """Computing: forward, backward, optimizer step."""
    wait_input: float
    """Waiting for an activation, a gradient, or copies of decoders."""
    wait_queue: float
    """Waiting until a message can be sent: for a free slot, or for a receiver that blocks the sender."""
    wait_data: float
    """Waiting for the data iterator."""
    wait_barrier: float
    """Waiting for all stages: at a barrier, or for the loss that DeepSpeed broadcasts."""
    wait_copies: float
    """Waiting for the stage's data parallel replicas, to average gradients."""
    drained: float
    """Finished, while later stages still compute."""
    other: float
    """Everything else: copying, the engine, Python."""
    copy: int = 0
    """Index of the data parallel replica of the pipeline."""

    @property
    def bubble(self) -> float:
        """Share of the time in which the stage does not compute."""
        return 1 - self.busy


def whole(events: Sequence[Event]) -> list[Event]:
    """Returns the events of whole instructions, without those of single layers."""
    return [event for event in events if event.layer is None]


def computing(events: Sequence[Event]) -> list[Event]:
    """Returns the instructions in which a stage computes. All others, such as receiving and sending, are idle time."""
    return [event for event in whole(events) if event.instruction in COMPUTING]


def span(events: Sequence[Event]) -> tuple[float, float]:
    """Returns start of the first and end of the last computation, in seconds of the events' clock."""
    busy = computing(events)
    return min(event.start for event in busy), max(event.end for event in busy)


def idle_share(events: Sequence[Event]) -> float:
    """Returns the mean bubble of all stages."""
    times = stage_times(events)
    return sum(time.bubble for time in times) / len(times)


def stage_times(events: Sequence[Event]) -> list[StageTime]:
    """Computes busy and idle time of every stage, sorted by data parallel replica and stage.

    Args:
        events: events of all ranks, on one clock; a stage computes in at least one of them.
    """
    start, end = span(events)
    length = end - start
    times = []
    for replica, stage in sorted({event.place for event in events}):
        own = [event for event in whole(events) if event.place == (replica, stage)]
        shares = dict.fromkeys(("busy", *CAUSES), 0.0)
        for event in own:
            if event.instruction in COMPUTING:
                shares["busy"] += event.seconds / length
            elif event.instruction in _WAITS:
                waited = min(event.start + event.wait, end) - max(event.start, start)
                shares[_WAITS[event.instruction]] += max(waited, 0.0) / length
        shares["drained"] = max(end - max(event.end for event in own), 0.0) / length
        shares["other"] = max(1 - sum(shares.values()), 0.0)
        times.append(StageTime(stage=stage, copy=replica, span=length, **shares))
    return times


def bytes_sent(events: Sequence[Event]) -> dict[int, int]:
    """Returns the bytes sent by each stage, summed over data parallel replicas."""
    sent = dict.fromkeys(sorted({event.stage for event in events}), 0)
    for event in events:
        if event.instruction in MESSAGES:
            sent[event.stage] += event.nbytes or 0
    return sent


def critical_path(events: Sequence[Event]) -> list[Event]:
    """Returns the chain of computations that determines the length of the run, first to last.

    The chain is followed backward from the computation that ended last. The predecessor of an instruction is the
    previous one of the same stage; of a receive that waited, the send; of a send that waited, the instruction before
    the matching receive; of a barrier, the instruction before it on the stage that reached it last, and of an
    averaging of gradients, on the replica that reached it last.
    """
    own: dict[tuple[int, int], list[Event]] = defaultdict(list)
    for event in sorted(whole(events), key=lambda event: event.end):
        own[event.place].append(event)
    numbers = {id(event): number for each in own.values() for number, event in enumerate(each)}
    index = {(*event.place, event.instruction, event.micro_batch): event for each in own.values() for event in each}
    senders = {receiving: (sending, distance) for sending, (receiving, distance) in MESSAGES.items()}

    def cause(event: Event) -> Event | None:
        if event.instruction in senders and event.wait > 0.5 * event.seconds:
            sending, distance = senders[event.instruction]
            sent = index.get((event.copy, event.stage - distance, sending, event.micro_batch))
            if sent is not None and event.start < sent.start < event.end:
                return sent
        if event.instruction in MESSAGES and event.wait > 0.5 * event.seconds:
            receiving, distance = MESSAGES[event.instruction]
            received = index.get((event.copy, event.stage + distance, receiving, event.micro_batch))
            if received is not None and event.start < received.start < event.end:
                return before(received)
        if event.instruction in _MEETINGS:
            those = [place for place in own if _MEETINGS[event.instruction](place, event.place)]
            together = [index.get((*place, event.instruction, event.micro_batch)) for place in those]
            last = max((each for each in together if each is not None), key=lambda each: each.start)
            if last.place != event.place:
                return before(last)
        return before(event)

    def before(event: Event) -> Event | None:
        number = numbers[id(event)]
        return own[event.place][number - 1] if number else None

    path: list[Event] = []
    current: Event | None = max(computing(events), key=lambda event: event.end)
    while current is not None:
        if current.instruction in COMPUTING:
            path.append(current)
        current = cause(current)
    return path[::-1]
