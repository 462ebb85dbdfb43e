"""Draws recorded runs one above the other: who computed what when, who waited, and how much memory was held."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_al.trace.analysis import computing, critical_path, idle_share, span, whole
from ds_al.trace.event import Event

# Okabe and Ito's palette: told apart by colour-blind readers, and by their lightness in print.
COLOURS = {"ForwardPass": "#56B4E9", "BackwardPass": "#E69F00", "OptimizerStep": "#000000"}
_LABELS = {"ForwardPass": "forward", "BackwardPass": "backward", "OptimizerStep": "optimizer step"}
_WAITING = {"RecvActivation", "RecvGrad", "SendActivation", "SendGrad", "LoadMicroBatch"}
_TOGETHER = {"Barrier", "LossBroadcast"}
_GREY = "#D5D5D5"
_STAGES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#F0E442")
_DASHES = ("-", "--", "-.", ":")


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
        events_by_method: events of all stages of one run, by the method's name.
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
    figure, panels = _panels(len(events_by_method), height=0.85 + 0.38 * _stages(events_by_method))
    spans = {method: span(events) for method, events in events_by_method.items()}
    longest = max(end - start for start, end in spans.values())
    for axes, (method, events) in zip(panels, events_by_method.items(), strict=True):
        start, end = spans[method]
        for event in whole(events):
            _bar(axes, event, start=start, end=end, longest=longest, micro_batches=micro_batches)
        for event in critical_path(events):
            times = [event.start - start, event.end - start]
            axes.plot(times, [event.stage + 0.46] * 2, color="#D55E00", linewidth=2, solid_capstyle="butt")
        formula = f", {expected_by} {expected[method]:.0%}" if expected and method in expected else ""
        title = f"{method}: {end - start:.2f} s, idle {idle_share(events):.0%}{formula}"
        axes.set_title(title, loc="left", fontsize=13)
        stages = max(event.stage for event in events) + 1
        axes.set_ylim(stages - 0.5, -0.5)
        axes.set_yticks(range(stages), [f"stage {stage}" for stage in range(stages)], fontsize=11)
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
        for stage in sorted({event.stage for event in events}):
            own = [event for event in whole(events) if event.stage == stage and event.memory is not None]
            held = [(event.memory or 0) / 2**20 for event in own]
            peak = max([peak, *held])
            axes.step(
                [event.end - start for event in own],
                held,
                where="pre",
                label=f"stage {stage}",
                color=_STAGES[stage % len(_STAGES)],
                linestyle=_DASHES[stage % len(_DASHES)],
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


def _stages(events_by_method: Mapping[str, Sequence[Event]]) -> int:
    return max(event.stage for events in events_by_method.values() for event in events) + 1


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


def _bar(axes: Any, event: Event, *, start: float, end: float, longest: float, micro_batches: int) -> None:
    left, right = max(event.start, start) - start, min(event.end, end) - start
    width, name = right - left, event.instruction
    if width <= 0:
        return
    if name in _WAITING or name in _TOGETHER:
        width = min(width, event.wait)
        if width > 0.002 * longest:
            hatch = "////" if name in _TOGETHER else None
            style = {"facecolor": "white" if hatch else _GREY, "edgecolor": _GREY, "linewidth": 0, "hatch": hatch}
            axes.broken_barh([(left, width)], (event.stage - 0.4, 0.8), **style)
        return
    if name not in COLOURS:
        return
    batch, micro_batch = divmod(event.micro_batch, micro_batches)
    is_step = name == "OptimizerStep"
    axes.broken_barh(
        [(left, width)],
        (event.stage - 0.4, 0.8),
        facecolor=COLOURS[name],
        edgecolor=COLOURS[name] if is_step else "white",  # a step of a millisecond stays visible as a line
        linewidth=1.0 if is_step else 0.6,
        alpha=1.0 if is_step or batch % 2 == 0 else 0.55,
    )
    if not is_step and width > 0.008 * longest:
        axes.text(left + width / 2, event.stage, str(micro_batch + 1), ha="center", va="center", fontsize=10)


def _legend(figure: Any) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    figure.legend(
        handles=[
            *(Patch(facecolor=COLOURS[key], label=label) for key, label in _LABELS.items()),
            Patch(facecolor=_GREY, label="waits for a message"),
            Patch(facecolor="white", edgecolor=_GREY, hatch="////", label="waits for all stages"),
            Patch(facecolor="white", edgecolor="0.6", label="idle"),
            Line2D([], [], color="#D55E00", linewidth=2, label="critical path"),
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
