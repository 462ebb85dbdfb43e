"""Where the time of a recorded run went: busy, and idle by cause, on every stage; and its critical path."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ds_al.trace.events import COMPUTING, MESSAGES, Event

CAUSES = ("wait_input", "wait_queue", "wait_data", "wait_barrier", "wait_copies", "drained", "other")
"""Why a stage is idle, as shares of :attr:`StageTime.span`; see there."""

_WAITS = {
    "RecvActivation": "wait_input",
    "RecvGrad": "wait_input",
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
"""Instructions in which ranks wait for each other: which two (copy, stage) do."""


@dataclass(frozen=True)
class StageTime:
    """What one stage did with the time of a run, as shares of it. ``busy`` and all causes add up to 1."""

    stage: int
    span: float
    """Seconds of the run: from the first stage's first computation until the last one's end, on any stage."""
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
    """Waiting for the stage's data parallel copies, whose gradients are averaged."""
    drained: float
    """Done, while later stages were not."""
    other: float
    """Everything else: copying, the engine, Python."""
    copy: int = 0
    """Which data parallel copy of the pipeline the stage is part of."""

    @property
    def bubble(self) -> float:
        """Share of the time in which the stage did not compute."""
        return 1 - self.busy


def whole(events: Sequence[Event]) -> list[Event]:
    """The instructions themselves, without the layers' parts of them."""
    return [event for event in events if event.layer is None]


def computing(events: Sequence[Event]) -> list[Event]:
    """The instructions in which a stage computes. All others, such as receiving and sending, are idle time."""
    return [event for event in whole(events) if event.instruction in COMPUTING]


def span(events: Sequence[Event]) -> tuple[float, float]:
    """When the first stage began to compute, and when the last one ended, in seconds of the events' clock."""
    busy = computing(events)
    return min(event.start for event in busy), max(event.end for event in busy)


def idle_share(events: Sequence[Event]) -> float:
    """Mean bubble of all stages."""
    times = stage_times(events)
    return sum(time.bubble for time in times) / len(times)


def stage_times(events: Sequence[Event]) -> list[StageTime]:
    """Busy and idle time of every stage, in the order of stages; with data parallel copies, copy after copy.

    Args:
        events: of all ranks, on one clock; at least one in which a stage computes.
    """
    start, end = span(events)
    length = end - start
    times = []
    for copy, stage in sorted({event.place for event in events}):
        own = [event for event in whole(events) if event.place == (copy, stage)]
        shares = dict.fromkeys(("busy", *CAUSES), 0.0)
        for event in own:
            if event.instruction in COMPUTING:
                shares["busy"] += event.seconds / length
            elif event.instruction in _WAITS:
                waited = min(event.start + event.wait, end) - max(event.start, start)
                shares[_WAITS[event.instruction]] += max(waited, 0.0) / length
        shares["drained"] = max(end - max(event.end for event in own), 0.0) / length
        shares["other"] = max(1 - sum(shares.values()), 0.0)
        times.append(StageTime(stage=stage, copy=copy, span=length, **shares))
    return times


def bytes_sent(events: Sequence[Event]) -> dict[int, int]:
    """Bytes that each stage sent, by stage; with data parallel copies, those of all of them."""
    sent = dict.fromkeys(sorted({event.stage for event in events}), 0)
    for event in events:
        if event.instruction in MESSAGES:
            sent[event.stage] += event.nbytes or 0
    return sent


def critical_path(events: Sequence[Event]) -> list[Event]:
    """The chain of instructions that made the run as long as it was, first to last.

    Followed from the computation that ended last, back to the first one. What an instruction had to wait for is
    what the same stage did before it; for a receive that waited, the send; for a send that waited, what its
    receiver did before it came to receive; for a barrier, what the stage did that came to it last, and for an
    average of gradients, the copy. Only computations are part of the result.
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
