"""Export to Chrome's trace event format, for Perfetto and chrome://tracing: processes are ranks, arrows messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ds_al.trace.events import LABELS, MESSAGES, Event, place_name


def chrome_trace(events: Sequence[Event], *, micro_batches: int, about: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the whole trace as one JSON object.

    It has a process per rank, sorted by replica and stage; a slice per instruction, with slices of layers inside; a
    flow from each send to its receive; and counters of queued messages and of memory held for backward, if recorded.

    Args:
        events: events of all ranks, on one clock.
        micro_batches: micro-batches per batch; batches are numbered from 1.
        about: content of ``otherData``.
    """
    pids = {place: pid for pid, place in enumerate(sorted({event.place for event in events}))}
    return {
        "traceEvents": [
            *_names(pids),
            *(_slice(event, pids, micro_batches) for event in events),
            *_flows(events, pids),
            *_counters(events, pids),
        ],
        "displayTimeUnit": "ms",
        "otherData": dict(about),
    }


_Pids = Mapping[tuple[int, int], int]
"""Process number of each (replica, stage)."""


def _names(pids: _Pids) -> Iterator[dict[str, Any]]:
    for place, pid in pids.items():
        for name, args in (
            ("process_name", {"name": place_name(place, replicas=len({replica for replica, _ in pids}))}),
            ("process_sort_index", {"sort_index": pid}),
        ):
            yield {"ph": "M", "name": name, "pid": pid, "tid": 0, "args": args}
        yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": 0, "args": {"name": "instructions"}}


def _slice(event: Event, pids: _Pids, micro_batches: int) -> dict[str, Any]:
    label = LABELS.get(event.instruction, event.instruction)
    batch, micro_batch = divmod(event.micro_batch, micro_batches)
    args: dict[str, Any] = {"instruction": event.instruction}
    if event.instruction not in ("OptimizerStep", "Barrier", "Evaluation", "LossBroadcast"):
        args |= {"batch": batch + 1, "micro_batch": micro_batch + 1}
    optional = {"layer": event.layer, "bytes": event.nbytes, "queue": event.queue, "memory_bytes": event.memory}
    args |= {name: value for name, value in optional.items() if value is not None}
    if event.wait:
        args["wait_ms"] = round(event.wait * 1000, 4)
    return {
        "ph": "X",
        "name": label if event.layer is None else f"layer {event.layer} {label}",
        "cat": "instruction" if event.layer is None else "layer",
        "pid": pids[event.place],
        "tid": 0,
        "ts": _microseconds(event.start),
        "dur": round(_microseconds(event.end) - _microseconds(event.start), 3),
        "args": args,
    }


def _flows(events: Sequence[Event], pids: _Pids) -> Iterator[dict[str, Any]]:
    whole = {(e.copy, e.stage, e.instruction, e.micro_batch): e for e in events if e.layer is None}
    for (replica, stage, instruction, number), sent in whole.items():
        if instruction not in MESSAGES:
            continue
        name, distance = MESSAGES[instruction]
        received = whole.get((replica, stage + distance, name, number))
        if received is None:
            continue
        common = {"name": "message", "cat": instruction, "id": f"{instruction}-{pids[sent.place]}-{number}", "tid": 0}
        # Both ends of a flow bind to the slice that encloses their time, so the times are just inside the slices.
        yield {"ph": "s", "pid": pids[sent.place], "ts": _microseconds(sent.start) + 0.001, **common}
        yield {"ph": "f", "bp": "e", "pid": pids[received.place], "ts": _microseconds(received.end) - 0.001, **common}


def _counters(events: Sequence[Event], pids: _Pids) -> Iterator[dict[str, Any]]:
    for event in events:
        common = {"ph": "C", "pid": pids[event.place], "tid": 0, "ts": _microseconds(event.end)}
        if event.queue is not None:
            name = "messages under way" if event.instruction == "SendActivation" else "messages here"
            yield {**common, "name": name, "args": {"messages": event.queue}}
        if event.memory is not None:
            yield {**common, "name": "held for backward", "args": {"MiB": round(event.memory / 2**20, 4)}}


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 3)
