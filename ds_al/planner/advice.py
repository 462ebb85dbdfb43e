"""Which method to take, said plainly, also where it is not this library's."""

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
_LEVEL = 1e-6  # relative; a smaller lead is none


def advice(predictions: Sequence[Prediction], work: Work, *, even: int | None, most: int | None = None) -> str:
    """Which method to take, of predictions that share P and M, in one or two sentences.

    Args:
        even: what :func:`break_even` gave.
        most: up to which M it looked; by default its own.
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
    if streaming.seconds <= best.seconds * (1 + _LEVEL) or best.method in AL:
        rest = min((each for each in predictions if each.method not in AL), key=attrgetter("seconds"))
        slower = rest.seconds / streaming.seconds
        return f"{setting}: use streaming; the next best, {rest.method}, takes {slower:.2f} times as long. {against}"
    slower = streaming.seconds / best.seconds
    return (
        f"{setting}: do not use streaming here, use {_NAMES[best.method]}; streaming takes {slower:.2f} times as long. "
        f"{against}"
    )


def break_even(work: Work, *, stages: int, machines: Machines | None = None, most: int = 10_000) -> int | None:
    """The least M at which 1F1B is no slower than streaming; ``None`` if there is none up to ``most``.

    The more micro-batches a batch has, the less 1F1B loses to its bubble, and streaming goes on paying rho and a
    step per micro-batch. Both times grow by as much with every micro-batch once the pipeline is full, so beyond
    ``4 P`` (128 with more stages) the M is where two lines cross.
    """

    def lead(m: int) -> float:
        """Seconds by which streaming is faster."""
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
    low, high = 0, far  # streaming wins below, or at 0; 1F1B does at high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if lead(middle) > 0 else (low, middle)
    return high
