"""Trace files: ``trace.json`` for Perfetto and chrome://tracing, ``trace.csv`` for all other tools."""

from __future__ import annotations

import csv
import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ds_al.trace.chrome import chrome_trace
from ds_al.trace.clock import ClockOffset
from ds_al.trace.events import MESSAGES, Event

COLUMNS = tuple(field.name for field in fields(Event))
"""Columns of ``trace.csv``: the fields of :class:`~ds_al.trace.events.Event`; times in seconds, sizes in bytes."""


def merge(by_rank: Sequence[Iterable[Event]], clocks: Sequence[ClockOffset]) -> list[Event]:
    """Merges the events of all ranks on one clock, with 0 at the start of the first event; sorted by start."""
    events = [
        replace(event, start=event.start - clock.correction, end=event.end - clock.correction)
        for own, clock in zip(by_rank, clocks, strict=True)
        for event in own
    ]
    zero = min((event.start for event in events), default=0.0)
    events = [replace(event, start=event.start - zero, end=event.end - zero) for event in events]
    return sorted(_with_queues(events), key=lambda event: (event.start, -event.end))


def _with_queues(events: Sequence[Event]) -> Iterator[Event]:
    """Adds the number of messages in flight: from the end of their send to the end of their receive."""
    ends: dict[_End, list[float]] = defaultdict(list)
    for event in events:
        ends[event.copy, event.stage, event.instruction].append(event.end)
    for times in ends.values():
        times.sort()
    for event in events:
        channel = _channel(event)
        if channel is None or event.layer is not None:
            yield event
            continue
        sent, received = (bisect_right(ends[end], event.end) for end in channel)
        yield replace(event, queue=max(sent - received, 0))


_End = tuple[int, int, str]
"""One end of a channel: replica, stage and instruction."""


def _channel(event: Event) -> tuple[_End, _End] | None:
    """Returns sending and receiving end of an event's channel; ``None`` if it is neither a send nor a receive."""
    for sending, (receiving, distance) in MESSAGES.items():
        if event.instruction == sending:
            return (event.copy, event.stage, sending), (event.copy, event.stage + distance, receiving)
        if event.instruction == receiving:
            return (event.copy, event.stage - distance, sending), (event.copy, event.stage, receiving)
    return None


def write_trace(
    folder: Path, events: Sequence[Event], *, micro_batches: int, about: Mapping[str, Any] | None = None
) -> list[Path]:
    """Writes both files, creating the folder, and returns their paths.

    Args:
        events: events of all ranks, as :func:`merge` returns them.
        micro_batches: micro-batches per batch.
        about: metadata for ``trace.json``, such as method and clock offsets.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chrome, table = folder / "trace.json", folder / "trace.csv"
    chrome.write_text(json.dumps(chrome_trace(events, micro_batches=micro_batches, about=about or {})) + "\n")
    with table.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for event in events:
            values = [getattr(event, column) for column in COLUMNS]
            writer.writerow([round(value, 7) if isinstance(value, float) else value for value in values])
    return [chrome, table]


def read_trace(path: Path) -> list[Event]:
    """Reads a ``trace.csv``."""
    with path.open(newline="") as file:
        return [_event(row) for row in csv.DictReader(file)]


def _event(row: Mapping[str, str]) -> Event:
    integers = {
        name: int(row[name]) if row[name] else None
        for name in ("stage", "micro_batch", "layer", "nbytes", "queue", "memory")
    }
    integers["copy"] = int(row.get("copy") or 0)  # older tables have none
    times = {name: float(row[name]) for name in ("start", "end", "wait")}
    return Event(instruction=row["instruction"], **integers, **times)  # type: ignore[arg-type]
