"""Closed formulas of time and bubble fraction, for equal stages on which only forwards and backwards take time."""

from __future__ import annotations


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
    }[method]


def bubble_formula(
    method: str, *, stages: int, micro_batches: int, batches: int, forward: float, backward: float
) -> float:
    """Returns the share of :func:`ideal_seconds` in which a stage does not compute. Same arguments."""
    ideal = ideal_seconds(
        method, stages=stages, micro_batches=micro_batches, batches=batches, forward=forward, backward=backward
    )
    return 1 - batches * micro_batches * (forward + backward) / ideal
