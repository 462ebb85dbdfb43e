"""Figures of recorded events: a timeline of computing and waiting per stage, and memory over time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ds_al.figures.parts import Chart, Series, Slice, Timeline
from ds_al.trace.analysis import computing, critical_path, idle_share, span, whole
from ds_al.trace.events import MESSAGES, Event, place_name

_COMPUTING = {
    "ForwardPass": "forward",
    **dict.fromkeys(("BackwardPass", "BackwardInput", "BackwardWeight"), "backward"),
    "OptimizerStep": "step",
}
_WAITING = {
    **dict.fromkeys((*MESSAGES, *(receiving for receiving, _ in MESSAGES.values())), "waits for a message"),
    **dict.fromkeys(("CommitP2P", "LoadMicroBatch"), "waits for a message"),
    **dict.fromkeys(("Barrier", "LossBroadcast", "ReduceGrads"), "waits for other ranks"),
}
_Place = tuple[int, int]  # replica and stage


def timeline(
    events: Sequence[Event],
    *,
    name: str,
    micro_batches: int,
    expected: float | None = None,
    expected_by: str = "formula",
) -> Timeline:
    """Builds a timeline with a row per replica and stage, from the first computation to the end of the last one.

    Args:
        events: events of all ranks of one run.
        name: name of the run, for the title.
        micro_batches: micro-batches per batch, numbered from 1 in each batch.
        expected: expected bubble, for the title.
        expected_by: source of the expectation.

    Raises:
        ValueError: no event is a computation.
    """
    begin, end = _span(events, name)
    places = _places(events)
    formula = f", {expected_by} {expected:.0%}" if expected is not None else ""
    return Timeline(
        title=f"{name}: {end - begin:.2f} s, idle {idle_share(events):.0%}{formula}",
        rows=_names(places),
        slices=list(_slices(events, places, begin=begin, end=end, micro_batches=micro_batches)),
        end=end - begin,
        path=[(places.index(e.place), e.start - begin, e.end - begin) for e in critical_path(events)],
        x_label="seconds; the number is the micro-batch, every second batch is lighter",
    )


def memory(events: Sequence[Event], *, name: str) -> Chart:
    """Builds a chart of the memory held for backward over time, with a line per replica and stage.

    Args:
        events: events of all ranks of one run, recorded with memory.
        name: name of the run, for the title.

    Raises:
        ValueError: no event is a computation.
    """
    begin, _ = _span(events, name)
    places = _places(events)
    series = []
    for number, (place, row) in enumerate(zip(places, _names(places), strict=True)):
        own = [(e.end - begin, e.memory / 2**20) for e in whole(events) if e.place == place and e.memory is not None]
        series.append(Series(row, x=[time for time, _ in own], y=[held for _, held in own], style=number, look="steps"))
    peak = max((held for each in series for held in each.y if held is not None), default=0.0)
    return Chart(f"{name}: at most {peak:.3g} MiB on a stage", x_label="seconds", y_label="MiB", series=series)


def _slices(
    events: Sequence[Event], places: Sequence[_Place], *, begin: float, end: float, micro_batches: int
) -> Iterator[Slice]:
    for event in whole(events):
        kind = _COMPUTING.get(event.instruction) or _WAITING.get(event.instruction)
        left, right = max(event.start, begin), min(event.end, end)
        if event.instruction in _WAITING:
            right = min(right, left + event.wait)  # the rest of a message is copying
        if kind is None or right <= left:
            continue
        batch, micro_batch = divmod(event.micro_batch, micro_batches)
        passes = kind in ("forward", "backward")
        yield Slice(
            row=places.index(event.place),
            kind=kind,
            start=left - begin,
            end=right - begin,
            label=str(micro_batch + 1) if passes else "",
            faint=passes and batch % 2 == 1,
        )


def _span(events: Sequence[Event], name: str) -> tuple[float, float]:
    if not computing(events):
        raise ValueError(f"{name}: got {len(events)} events, none a forward or backward: record a training run")
    return span(events)


def _places(events: Sequence[Event]) -> list[_Place]:
    return sorted({event.place for event in events})


def _names(places: Sequence[_Place]) -> list[str]:
    return [place_name(place, replicas=len({replica for replica, _ in places})) for place in places]
