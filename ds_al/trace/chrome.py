"""Chrome's trace event format, which Perfetto and chrome://tracing open: stages as processes, arrows for messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ds_al.trace.event import LABELS, MESSAGES, Event


def chrome_trace(events: Sequence[Event], *, micro_batches: int, about: Mapping[str, Any]) -> dict[str, Any]:
    """The whole trace as one JSON object.

    A slice per instruction, with the layers' slices inside it; a flow from each send to its receive; counters
    of queued messages and of the memory that is held for backward, where these were recorded.

    Args:
        events: of all stages, on one clock.
        micro_batches: micro-batches per batch, which number batches from 1.
        about: goes to ``otherData``.
    """
    stages = sorted({event.stage for event in events})
    return {
        "traceEvents": [
            *_names(stages),
            *(_slice(event, micro_batches) for event in events),
            *_flows(events),
            *_counters(events),
        ],
        "displayTimeUnit": "ms",
        "otherData": dict(about),
    }


def _names(stages: Sequence[int]) -> Iterator[dict[str, Any]]:
    for stage in stages:
        for name, args in (
            ("process_name", {"name": f"stage {stage}"}),
            ("process_sort_index", {"sort_index": stage}),
        ):
            yield {"ph": "M", "name": name, "pid": stage, "tid": 0, "args": args}
        yield {"ph": "M", "name": "thread_name", "pid": stage, "tid": 0, "args": {"name": "instructions"}}


def _slice(event: Event, micro_batches: int) -> dict[str, Any]:
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
        "pid": event.stage,
        "tid": 0,
        "ts": _microseconds(event.start),
        "dur": round(_microseconds(event.end) - _microseconds(event.start), 3),
        "args": args,
    }


def _flows(events: Sequence[Event]) -> Iterator[dict[str, Any]]:
    whole = {(e.stage, e.instruction, e.micro_batch): e for e in events if e.layer is None}
    for (stage, instruction, number), sent in whole.items():
        if instruction not in MESSAGES:
            continue
        name, distance = MESSAGES[instruction]
        received = whole.get((stage + distance, name, number))
        if received is None:
            continue
        common = {"name": "message", "cat": instruction, "id": f"{instruction}-{stage}-{number}", "tid": 0}
        # A flow's ends bind to the slices around their times, so these lie just inside of them.
        yield {"ph": "s", "pid": stage, "ts": _microseconds(sent.start) + 0.001, **common}
        yield {"ph": "f", "bp": "e", "pid": received.stage, "ts": _microseconds(received.end) - 0.001, **common}


def _counters(events: Sequence[Event]) -> Iterator[dict[str, Any]]:
    for event in events:
        common = {"ph": "C", "pid": event.stage, "tid": 0, "ts": _microseconds(event.end)}
        if event.queue is not None:
            name = "messages under way" if event.instruction == "SendActivation" else "messages here"
            yield {**common, "name": name, "args": {"messages": event.queue}}
        if event.memory is not None:
            yield {**common, "name": "held for backward", "args": {"MiB": round(event.memory / 2**20, 4)}}


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 3)
