"""What the ranks of a job have written about their processes: deaths, and a timeline with the holes that they leave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ds_al.figures.parts import Slice, Timeline
from ds_al.studies.bench.recovery_job import Job, lines

Line = Mapping[str, Any]
COMPUTES = ("ForwardPass", "BackwardPass", "OptimizerStep")
TRAINED = "BackwardPass"
"""The instruction after which a micro-batch counts as trained."""
_JOINED = 0.25  # seconds; computations with a shorter gap between them are drawn as one


class Death(NamedTuple):
    """Death of the process of a stage; moments are those of ``time.time()``."""

    micro_batch: int
    killed: float
    trains: float | None
    """When another process began to train; ``None`` while there is none."""
    back: float | None
    """When it had trained this micro-batch."""


def deaths(own: Sequence[Line]) -> list[Death]:
    """Returns the deaths of one stage, from its lines."""
    found = []
    for place, line in enumerate(own):
        if line["what"] == "killed":
            after, number = own[place + 1 :], line["number"]
            trains = next((x["start"] for x in after if x["what"] in COMPUTES), None)
            back = next((x["end"] for x in after if x["what"] == TRAINED and x["number"] == number), None)
            found.append(Death(number, line["moment"], trains, back))
    return found


def timeline(title: str, job: Job) -> Timeline:
    """Returns a timeline with a row per stage: where it trains, trains again, or has no process."""
    by_stage = [lines(Path(job.folder), stage) for stage in range(job.stages)]
    moments = [(line["start"], line["end"]) for own in by_stage for line in own if line["what"] in COMPUTES]
    begin, end = min(start for start, _ in moments), max(end for _, end in moments)
    end = max([end, *(death.killed for own in by_stage for death in deaths(own))])
    slices = [
        Slice(row, kind, start - begin, stop - begin)
        for row, own in enumerate(by_stage)
        for kind, start, stop in _slices(own, end=end)
    ]
    return Timeline(title, [f"stage {stage}" for stage in range(job.stages)], slices, end - begin)


def _slices(own: Sequence[Line], *, end: float) -> Iterator[tuple[str, float, float]]:
    """Yields kind, start and end of the parts of a row."""
    again = []
    for death in deaths(own):
        yield "no process", death.killed, end if death.trains is None else death.trains
        if death.trains is not None:
            again.append((death.trains, death.back or end))
            yield "trains again", *again[-1]
    start = stop = None
    for line in own:
        if line["what"] not in COMPUTES or any(first <= line["start"] < last for first, last in again):
            continue
        if stop is None or line["start"] > stop + _JOINED:
            if start is not None and stop is not None:
                yield "trains", start, stop
            start = line["start"]
        stop = line["end"]
    if start is not None and stop is not None:
        yield "trains", start, stop
