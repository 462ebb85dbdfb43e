"""Closed formulas of time and bubble fraction, for equal stages on which only forwards and backwards take time."""

from __future__ import annotations

from ds_al.group_schedule import group_graphs, group_seconds


def ideal_seconds(
    method: str, *, stages: int, micro_batches: int, batches: int, forward: float, backward: float
) -> float:
    """Returns the time of ``batches`` batches if only forwards and backwards take time, on equal stages.

    Args:
        method: a name of :data:`~ds_al.schedule.AL_SCHEDULES` or :data:`~ds_al.baseline.schedules.BACKPROP_SCHEDULES`.
        stages: number of stages, P.
        micro_batches: micro-batches per batch, M.
        batches: number of batches.
        forward, backward: seconds per micro-batch and stage; for AL methods those of the AL form, including bridges.
            The two halves of a split backward pass, and the two parts of a stage of ``bp_dualpipev``, are equal. The
            times of ``bp_zb_*`` are for ``b = 2 f``; otherwise they may take longer.
    """
    p, m, n, f, b = stages, micro_batches, batches, forward, backward
    return {
        "streaming": n * m * (f + b) + (p - 1) * f,
        "forward_first": n * (m * (f + b) + (p - 1) * f),
        "parallel_backward": n * m * (p * f + b),
        "sequential": n * m * p * (f + b),
        "bp_1f1b": n * (m + p - 1) * (f + b),
        "bp_gpipe": n * (m + p - 1) * (f + b),
        "bp_naive": n * m * p * (f + b),
        "bp_zb_h1": n * _whole("zb_h1", p, m, f, b),
        "bp_zb_h2": n * _whole("zb_h2", p, m, f, b) + group_fill("zb_h2", size=p, micro_batches=m, weights=b / 2),
        "bp_dualpipev": n * dualpipev_seconds(stages=p, micro_batches=m, forward=f, backward=b),
        "bp_async": (n * m + p - 1) * (f + b),
    }[method]


def dualpipev_seconds(*, stages: int, micro_batches: int, forward: float, backward: float) -> float:
    """Returns the time of a batch of DeepSpeed's DualPipeV, whose backward passes are whole.

    With ``b >= 2 f`` it saves ``P f / 2`` of the time of 1F1B. Arguments as for :func:`ideal_seconds`.
    """
    p, m, f, b = stages, micro_batches, forward, backward
    return m * (f + b) + (p - 1) * (f / 2 + b) + max(-f, (p - 1) * (f - b) + max(f - b, 0.0)) / 2


def _whole(schedule: str, stages: int, micro_batches: int, forward: float, backward: float) -> float:
    """Returns the period of a group of all stages, whose backward passes have equal halves."""
    halves = (backward / 2, backward / 2)
    return group_seconds(schedule, size=stages, micro_batches=micro_batches, forward=forward, halves=halves)


def bubble_formula(
    method: str, *, stages: int, micro_batches: int, batches: int, forward: float, backward: float
) -> float:
    """Returns the share of :func:`ideal_seconds` in which a stage does not compute. Same arguments."""
    ideal = ideal_seconds(
        method, stages=stages, micro_batches=micro_batches, batches=batches, forward=forward, backward=backward
    )
    return 1 - batches * micro_batches * (forward + backward) / ideal


def group_fill(schedule: str, *, size: int, micro_batches: int, weights: float) -> float:
    """Returns how much later than the first stage of a group its last one ends: ``zb_h2`` runs on without a drain.

    Args:
        schedule, size, micro_batches: as for :func:`~ds_al.group_schedule.group_seconds`.
        weights: seconds of the gradients of weights, b_w.
    """
    deferred = group_graphs(schedule, size=size, micro_batches=micro_batches)
    return (deferred - 1) // 2 * weights if schedule == "zb_h2" else 0.0


def held_graphs(method: str, *, stages: int, micro_batches: int) -> float:
    """Returns the largest number of micro-batches whose graphs a stage holds.

    Args:
        method: ``streaming`` or a ``bp_*`` method.
        stages: number of stages, P.
        micro_batches: micro-batches per batch, M.
    """
    p, m = stages, micro_batches
    return {
        "streaming": 1,
        "bp_1f1b": min(p, m),
        "bp_zb_h1": min(p, m),
        "bp_zb_h2": min(2 * p - 1, m),
        "bp_dualpipev": p + 1 / 2,
    }[method]
