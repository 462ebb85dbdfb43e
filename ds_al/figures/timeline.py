"""Draws recorded runs one above the other: who computed what when, who waited, and how much memory was held."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_al.figures import palette
from ds_al.trace.analysis import computing, critical_path, idle_share, span, whole
from ds_al.trace.events import MESSAGES, Event, place_name

_COLOURS = {"ForwardPass": palette.FORWARD, "BackwardPass": palette.BACKWARD, "OptimizerStep": palette.STEP}
_LABELS = {"ForwardPass": "forward", "BackwardPass": "backward", "OptimizerStep": "optimizer step"}
_WAITING = {*MESSAGES, *(receiving for receiving, _ in MESSAGES.values()), "LoadMicroBatch"}
_TOGETHER = {"Barrier", "LossBroadcast", "ReduceGrads"}
_Place = tuple[int, int]  # copy and stage


def draw(
    events_by_method: Mapping[str, Sequence[Event]],
    path: Path,
    *,
    micro_batches: int,
    expected: Mapping[str, float] | None = None,
    expected_by: str = "formula",
) -> list[Path]:
    """Draws one panel per method on a common time scale; stages are rows, what is not coloured is idle.

    Args:
        events_by_method: events of all ranks of one run, by the method's name; a row for each stage of each copy.
        path: where the picture goes; its suffix is replaced.
        micro_batches: micro-batches per batch, which are numbered from 1 in each batch.
        expected: bubble that is expected, by method, to be told beside the measured one.
        expected_by: what expects it.

    Returns:
        The files: PNG and SVG.

    Raises:
        ValueError: a method has no event in which a stage computes.
    """
    _check(events_by_method)
    figure, panels = _panels(
        len(events_by_method), height=0.85 + 0.38 * max(map(len, map(_places, events_by_method.values())))
    )
    spans = {method: span(events) for method, events in events_by_method.items()}
    longest = max(end - start for start, end in spans.values())
    for axes, (method, events) in zip(panels, events_by_method.items(), strict=True):
        start, end = spans[method]
        rows = {place: row for row, place in enumerate(_places(events))}
        for event in whole(events):
            _bar(
                axes,
                event,
                row=rows[event.place],
                start=start,
                end=end,
                longest=longest,
                micro_batches=micro_batches,
            )
        for event in critical_path(events):
            times, y = [event.start - start, event.end - start], rows[event.place] + 0.46
            axes.plot(times, [y] * 2, color=palette.CRITICAL_PATH, linewidth=2, solid_capstyle="butt")
        formula = f", {expected_by} {expected[method]:.0%}" if expected and method in expected else ""
        title = f"{method}: {end - start:.2f} s, idle {idle_share(events):.0%}{formula}"
        axes.set_title(title, loc="left", fontsize=13)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), _names(list(rows)), fontsize=11)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.axvline(end - start, color="0.4", linewidth=1, linestyle=(0, (4, 3)))
    panels[-1].set_xlim(0, longest * 1.01)
    panels[-1].set_xlabel("seconds; the number is the micro-batch, every second batch is lighter", fontsize=11)
    _legend(figure)
    return _save(figure, path)


def draw_memory(events_by_method: Mapping[str, Sequence[Event]], path: Path) -> list[Path]:
    """Draws what autograd held for backward over time: one panel per method, a line per stage.

    Args:
        events_by_method: events recorded with memory, of all stages of one run, by the method's name.
        path: where the picture goes; its suffix is replaced.

    Returns:
        The files: PNG and SVG.

    Raises:
        ValueError: a method has no event in which a stage computes.
    """
    _check(events_by_method)
    figure, panels = _panels(len(events_by_method), height=1.7, sharey=True)
    for axes, (method, events) in zip(panels, events_by_method.items(), strict=True):
        start, _ = span(events)
        peak = 0.0
        places = _places(events)
        for number, (place, name) in enumerate(zip(places, _names(places), strict=True)):
            own = [event for event in whole(events) if event.place == place and event.memory is not None]
            held = [(event.memory or 0) / 2**20 for event in own]
            peak = max([peak, *held])
            axes.step(
                [event.end - start for event in own],
                held,
                where="pre",
                label=name,
                color=palette.STAGES[number % len(palette.STAGES)],
                linestyle=palette.DASHES[number % len(palette.DASHES)],
                linewidth=1.6,
            )
        axes.set_title(f"{method}: at most {peak:.3g} MiB on a stage", loc="left", fontsize=13)
        axes.set_ylabel("MiB", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    panels[-1].set_xlabel("seconds", fontsize=11)
    panels[-1].set_xlim(left=0)
    highest = max(event.memory or 0 for events in events_by_method.values() for event in events) / 2**20
    panels[-1].set_ylim(0, 1.06 * highest or 1)  # one scale: a panel of its own would hide what differs
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=8, frameon=False, fontsize=11)
    return _save(figure, path)


def _check(events_by_method: Mapping[str, Sequence[Event]]) -> None:
    for method, events in events_by_method.items():
        if not computing(events):
            raise ValueError(f"{method}: got {len(events)} events, none a forward or backward: record a training run")


def _places(events: Sequence[Event]) -> list[_Place]:
    return sorted({event.place for event in events})


def _names(places: Sequence[_Place]) -> list[str]:
    return [place_name(place, copies=len({copy for copy, _ in places})) for place in places]


def _panels(count: int, *, height: float, sharey: bool = False) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.9 + count * height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(count, 1, sharex=True, sharey=sharey, squeeze=False)[:, 0]
    for axes in panels:
        axes.set_facecolor("white")
        axes.tick_params(axis="x", labelsize=11)
    return figure, panels


def _bar(axes: Any, event: Event, *, row: int, start: float, end: float, longest: float, micro_batches: int) -> None:
    left, right = max(event.start, start) - start, min(event.end, end) - start
    width, name = right - left, event.instruction
    if width <= 0:
        return
    if name in _WAITING or name in _TOGETHER:
        width = min(width, event.wait)
        if width > 0.002 * longest:
            hatch = "////" if name in _TOGETHER else None
            face, edge = "white" if hatch else palette.WAITING, palette.WAITING
            axes.broken_barh(
                [(left, width)], (row - 0.4, 0.8), facecolor=face, edgecolor=edge, linewidth=0, hatch=hatch
            )
        return
    if name not in _COLOURS:
        return
    batch, micro_batch = divmod(event.micro_batch, micro_batches)
    is_step = name == "OptimizerStep"
    axes.broken_barh(
        [(left, width)],
        (row - 0.4, 0.8),
        facecolor=_COLOURS[name],
        edgecolor=_COLOURS[name] if is_step else "white",  # a step of a millisecond stays visible as a line
        linewidth=1.0 if is_step else 0.6,
        alpha=1.0 if is_step or batch % 2 == 0 else 0.55,
    )
    if not is_step and width > 0.008 * longest:
        axes.text(left + width / 2, row, str(micro_batch + 1), ha="center", va="center", fontsize=10)


def _legend(figure: Any) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    figure.legend(
        handles=[
            *(Patch(facecolor=_COLOURS[key], label=label) for key, label in _LABELS.items()),
            Patch(facecolor=palette.WAITING, label="waits for a message"),
            Patch(facecolor="white", edgecolor=palette.WAITING, hatch="////", label="waits for other ranks"),
            Patch(facecolor="white", edgecolor="0.6", label="idle"),
            Line2D([], [], color=palette.CRITICAL_PATH, linewidth=2, label="critical path"),
        ],
        loc="outside upper right",
        ncols=7,
        frameon=False,
        fontsize=10.5,
        columnspacing=1.2,
        handlelength=1.6,
    )


def _save(figure: Any, path: Path) -> list[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    for file in files:
        figure.savefig(file, dpi=160, facecolor="white")
    return files
