"""Converts a trace into a timeline: a bounded number of slices of a few kinds, and sums per stage."""

from __future__ import annotations

from collections.abc import Sequence

from ds_al.figures.palette import BUSY, KINDS
from ds_al.figures.parts import Chart, Series, Slice, Table, Timeline
from ds_al.report import texts
from ds_al.report.read import RunRecord, TraceEvent

_KIND_OF = {
    "ForwardPass": "forward",
    "BackwardPass": "backward",
    "BackwardInput": "backward",
    "BackwardWeight": "backward",
    "OptimizerStep": "step",
    "RecvActivation": "receive",
    "RecvGrad": "receive",
    "CommitP2P": "receive",
    "SendActivation": "send",
    "SendGrad": "send",
    "LoadMicroBatch": "load data",
    "Barrier": "barrier",
    "LossBroadcast": "barrier",
    "Evaluation": "evaluation",
}
_POINTS = 400


def kind(instruction: str) -> str:
    """Returns the kind of an instruction by DeepSpeed's class name."""
    return _KIND_OF.get(instruction, "other")


def timeline(run: RunRecord, *, label: str, key: str, most: int) -> Timeline:
    """Builds the timeline of the start of a run's trace.

    Args:
        run: a run with a trace.
        label: label of the run in the report.
        key: key that is unique in the report.
        most: maximum number of slices; the rest of the trace is omitted, which the description states.
    """
    # Evaluations before the first forward would take the place of training in the timeline.
    first = next((event.start for event in run.trace if kind(event.instruction) in BUSY), run.trace[0].start)
    events = [event for event in run.trace if event.end >= first]
    last = max(event.end for event in events)
    kept = events[:most]
    if len(kept) < len(events):
        end = kept[-1].start
        kept = [event for event in kept if event.start < end]
    else:
        end = last
    begin = min(event.start for event in kept) if kept else first
    slices = [
        Slice(
            row=event.stage,
            kind=kind(event.instruction),
            start=max(event.start - begin, 0.0),
            end=min(event.end, end) - begin,
            text=_text(event),
            nested=event.layer is not None,
        )
        for event in kept
    ]
    shown, whole = end - begin, last - begin
    cut = "" if end == last else f" The first {shown:.3g} s of {whole:.3g} s are shown."
    stages = max(event.stage for event in run.trace) + 1
    return Timeline(
        key=key,
        title=f"Timeline: {label}",
        description=f"What each stage of {run.name} did when, recorded on seed {texts.plain(run.seed)}. "
        f"Hatched is waiting or moving data; an empty piece is none of what was recorded.{cut}",
        rows=[f"stage {stage}" for stage in range(stages)],
        slices=slices,
        zoom=_zoom(run, kept, begin=begin, shown=shown),
        end=shown,
        table=_sums(run.trace, stages=stages, label=label),
    )


def held(run: RunRecord, *, label: str, key: str) -> Chart | None:
    """Builds the chart of bytes held for backward over time, or returns ``None`` if the trace has none."""
    first = next((event.start for event in run.trace if kind(event.instruction) in BUSY), run.trace[0].start)
    until = first + _zoom(run, run.trace, begin=first, shown=run.trace[-1].end - first)
    stages = max(event.stage for event in run.trace) + 1
    series, rows = [], []
    for stage in range(stages):
        points = [
            (event.end, event.memory)
            for event in run.trace
            if event.stage == stage and event.layer is None and event.memory is not None
        ]
        if not points:
            continue
        peak = max(memory for _, memory in points)
        rows.append([f"stage {stage}", texts.size(peak)])
        shown = [(end, memory) for end, memory in sorted(points) if first <= end <= until][:_POINTS]
        series.append(
            Series(
                name=f"stage {stage}",
                x=[round(end - first, 6) for end, _ in shown],
                y=[memory / 1024 for _, memory in shown],
                style=stage,
                look="steps",
            )
        )
    if not series:
        return None
    return Chart(
        key=key,
        title=f"Held for backward over time: {label}",
        description="Most bytes that autograd held for the backward pass during each instruction, in the first two "
        "batches.",
        x_label="seconds",
        y_label="KiB held",
        series=series,
        table=Table("Most that a stage held in the whole trace", ["stage", "most"], rows, frozenset({1})),
    )


def _text(event: TraceEvent) -> str:
    parts = [event.instruction]
    if event.micro_batch is not None:
        parts.append(f"micro-batch {event.micro_batch}")
    if event.layer is not None:
        parts.append(f"layer {event.layer}")
    parts.append(f"{(event.end - event.start) * 1000:.3g} ms")
    if event.wait:
        parts.append(f"waited {event.wait * 1000:.3g} ms")
    if event.nbytes:
        parts.append(texts.size(event.nbytes))
    if event.memory is not None:
        parts.append(f"holds {texts.size(event.memory)}")
    return ", ".join(parts)


def _zoom(run: RunRecord, events: Sequence[TraceEvent], *, begin: float, shown: float) -> float:
    """Returns the end of about two batches, since slices of more batches are too thin to see."""
    micro_batches = run.value("micro_batches")
    if not isinstance(micro_batches, int) or micro_batches < 1:
        return shown
    last_stage = max(event.stage for event in events)
    passes = [
        event.end
        for event in events
        if event.stage == last_stage and event.layer is None and event.instruction == "BackwardPass"
    ]
    return min(shown, (passes[2 * micro_batches - 1] - begin) * 1.02) if len(passes) >= 2 * micro_batches else shown


def _sums(events: Sequence[TraceEvent], *, stages: int, label: str) -> Table:
    whole = [event for event in events if event.layer is None]
    kinds = [name for name in KINDS if any(kind(event.instruction) == name for event in whole)]
    rows = []
    for stage in range(stages):
        own = [event for event in whole if event.stage == stage]
        seconds = {
            name: sum(event.end - event.start for event in own if kind(event.instruction) == name) for name in kinds
        }
        rows.append([f"stage {stage}", *(f"{seconds[name]:.3f}" for name in kinds), f"{sum(e.wait for e in own):.3f}"])
    return Table(
        f"Seconds of the whole trace by what a stage did: {label}",
        ["stage", *kinds, "waiting in these"],
        rows,
        frozenset(range(1, len(kinds) + 2)),
    )
