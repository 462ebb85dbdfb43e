"""Advice which method to use, including methods of other libraries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter

from ds_al.planner.predict import AL, Prediction, predict
from ds_al.planner.work import Machines, Work

_NAMES = {
    "bp_dp": "data parallel training, if the model and its optimizer fit on one device",
    "bp_zero_bubble": "a zero-bubble pipeline, by its formula, if its memory is there",
    "bp_interleaved": "an interleaved pipeline, by its formula",
    "bp_1f1b": "1F1B",
    "bp_gpipe": "GPipe, if its memory is there, or 1F1B",
}
_LEVEL = 1e-6  # relative difference below which two times count as equal


def advice(predictions: Sequence[Prediction], work: Work, *, even: int | None, most: int | None = None) -> str:
    """Returns advice which method to use, in one or two sentences.

    Args:
        predictions: predictions for one P and M.
        work: cost of the network.
        even: result of :func:`break_even`.
        most: largest M that it searched; by default its own default.
    """
    best = min(predictions, key=attrgetter("seconds"))
    streaming = next(each for each in predictions if each.method == "streaming")
    bp = next(each for each in predictions if each.method == "bp_1f1b")
    setting = f"P = {best.stages}, M = {best.micro_batches}, rho = {work.rho:.3g}, u = {1000 * work.step:.3g} ms"
    turn = "at any M" if even is None else f"up to M = {even - 1}" if even > 1 else "at no M"
    against = (
        f"Streaming is {bp.seconds / streaming.seconds:.2f} times as fast as 1F1B here, and faster {turn}"
        f"{f' (the break-even is M = {even})' if even is not None else ''}."
    )
    if _to_use(predictions) == "streaming":
        rest = min((each for each in predictions if each.method not in AL), key=attrgetter("seconds"))
        slower = rest.seconds / streaming.seconds
        return f"{setting}: use streaming; the next best, {rest.method}, takes {slower:.2f} times as long. {against}"
    slower = streaming.seconds / best.seconds
    return (
        f"{setting}: do not use streaming here, use {_NAMES[best.method]}; streaming takes {slower:.2f} times as long. "
        f"{against}"
    )


def summary(predictions: Sequence[Prediction]) -> list[str]:
    """Returns which method to use at each P, in a line that names the range of M for each."""
    lines = []
    for stages in dict.fromkeys(each.stages for each in predictions):
        own = [each for each in predictions if each.stages == stages]
        ranges: list[tuple[str, int, int]] = []
        for m in sorted({each.micro_batches for each in own}):
            name = _to_use([each for each in own if each.micro_batches == m])
            first = ranges.pop()[1] if ranges and ranges[-1][0] == name else m
            ranges.append((name, first, m))
        uses = (f"{name} at M = {a}" + (f" to {b}" if b > a else "") for name, a, b in ranges)
        lines.append(f"P = {stages}: {'; '.join(uses)}")
    return lines


def _to_use(predictions: Sequence[Prediction]) -> str:
    """Returns the method to use for one P and M."""
    best = min(predictions, key=attrgetter("seconds"))
    streaming = next(each for each in predictions if each.method == "streaming")
    if streaming.seconds <= best.seconds * (1 + _LEVEL) or best.method in AL:
        return "streaming"
    return _NAMES[best.method]


def break_even(work: Work, *, stages: int, machines: Machines | None = None, most: int = 10_000) -> int | None:
    """Returns the least M at which 1F1B is no slower than streaming; ``None`` if there is none up to ``most``.

    With more micro-batches per batch, 1F1B's bubble shrinks, while streaming pays rho and a step for each micro-batch.
    Once the pipeline is full, both times grow linearly in M, so beyond ``4 P`` (at most 128) the result is the
    intersection of two lines.
    """

    def lead(m: int) -> float:
        """Returns the seconds by which streaming is faster."""
        bp, al = (
            predict(name, work, stages=stages, micro_batches=m, machines=machines).seconds
            for name in ("bp_1f1b", "streaming")
        )
        return (bp - al) if bp - al > _LEVEL * bp else min(bp - al, 0.0)

    far = min(4 * stages, 128)
    near = far // 2
    if lead(far) > 0:
        slope = (lead(far) - lead(near)) / (far - near)
        crossing = math.inf if slope >= -1e-15 else far - lead(far) / slope
        whole = math.ceil(crossing - 1e-6) if crossing < most else most + 1
        return whole if whole <= most else None
    low, high = 0, far  # streaming is faster at low, unless that is 0; 1F1B is no slower at high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if lead(middle) > 0 else (low, middle)
    return high
