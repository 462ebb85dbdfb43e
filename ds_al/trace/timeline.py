"""Draws recorded runs one above the other: who computed what when, and who waited."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ds_al.trace.recorder import Event

# Okabe and Ito's palette: told apart by colour-blind readers, and by their lightness in print.
_COLOURS = {"ForwardPass": "#56B4E9", "BackwardPass": "#E69F00", "OptimizerStep": "#000000"}
_LABELS = {"ForwardPass": "forward", "BackwardPass": "backward", "OptimizerStep": "optimizer step"}


def busy_events(events: Sequence[Event]) -> list[Event]:
    """The events in which a stage computes. All others, such as receiving and sending, are waiting."""
    return [event for event in events if event.instruction in _COLOURS]


def span(events: Sequence[Event]) -> tuple[float, float]:
    """When the first stage began to compute, and when the last one ended, in seconds of the events' clock."""
    busy = busy_events(events)
    return min(event.start for event in busy), max(event.end for event in busy)


def idle_share(events: Sequence[Event]) -> float:
    """Share of all stages' time within :func:`span` in which they did not compute."""
    busy, (start, end) = busy_events(events), span(events)
    stages = len({event.stage for event in busy})
    return 1 - sum(event.end - event.start for event in busy) / (stages * (end - start))


def draw(events_by_method: Mapping[str, Sequence[Event]], path: Path, *, micro_batches: int) -> list[Path]:
    """Draws one panel per method on a common time scale; stages are rows, what is white is idle.

    Args:
        events_by_method: events of all stages of one run, by the method's name.
        path: where the picture goes; its suffix is replaced.
        micro_batches: micro-batches per batch, which are numbered from 1 in each batch.

    Returns:
        The files: PNG and SVG.

    Raises:
        ValueError: a method has no event in which a stage computes.
    """
    for method, events in events_by_method.items():
        if not busy_events(events):
            raise ValueError(f"{method}: got {len(events)} events, none a forward or backward: record a training run")
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no global state
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    spans = {method: span(events) for method, events in events_by_method.items()}
    longest = max(end - start for start, end in spans.values())
    stages = max(event.stage for events in events_by_method.values() for event in busy_events(events)) + 1
    figure = Figure(figsize=(11, 0.9 + len(spans) * (0.85 + 0.38 * stages)), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(spans), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (method, events) in zip(panels, events_by_method.items(), strict=True):
        start, end = spans[method]
        for event in busy_events(events):
            batch, micro_batch = divmod(event.micro_batch, micro_batches)
            left, width = event.start - start, event.end - event.start
            is_step = event.instruction == "OptimizerStep"
            colour = _COLOURS[event.instruction]
            axes.broken_barh(
                [(left, width)],
                (event.stage - 0.4, 0.8),
                facecolor=colour,
                edgecolor=colour if is_step else "white",  # a step of a millisecond stays visible as a line
                linewidth=1.0 if is_step else 0.6,
                alpha=1.0 if is_step or batch % 2 == 0 else 0.55,
            )
            if not is_step and width > 0.008 * longest:
                axes.text(left + width / 2, event.stage, str(micro_batch + 1), ha="center", va="center", fontsize=10)
        axes.set_title(f"{method}: {end - start:.2f} s, idle {idle_share(events):.0%}", loc="left", fontsize=13)
        axes.set_facecolor("white")
        axes.set_ylim(stages - 0.5, -0.5)
        axes.set_yticks(range(stages), [f"stage {stage}" for stage in range(stages)], fontsize=11)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelsize=11)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.axvline(end - start, color="0.4", linewidth=1, linestyle=(0, (4, 3)))
    panels[-1].set_xlim(0, longest * 1.01)
    panels[-1].set_xlabel("seconds; the number is the micro-batch, every second batch is lighter", fontsize=11)
    figure.legend(
        handles=[
            *(Patch(facecolor=_COLOURS[key], label=label) for key, label in _LABELS.items()),
            Patch(facecolor="white", edgecolor="0.6", label="idle"),
        ],
        loc="outside upper right",
        ncols=4,
        frameon=False,
        fontsize=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    for file in files:
        figure.savefig(file, dpi=160, facecolor="white")
    return files
