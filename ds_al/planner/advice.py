"""Advice which method to use, including methods of other libraries, and how many AL layers on how many stages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from ds_al.planner.groups import group_sizes
from ds_al.planner.predict import predict
from ds_al.planner.prediction import Prediction
from ds_al.planner.work import Machines, Work

_NAMES = {
    "bp_dp": "data parallel training (bp_dp), if the model and its optimizer fit on one device",
    "bp_dualpipev": "DualPipeV (bp_dualpipev, by its formula), if its memory is there",
    "bp_zb_h1": "zero bubble (bp_zb_h1), if its memory is there",
    "bp_zb_h2": "zero bubble (bp_zb_h2), if its memory is there",
    "bp_interleaved": "an interleaved pipeline, by its formula",
    "bp_1f1b": "1F1B",
    "bp_gpipe": "GPipe, if its memory is there, or 1F1B",
}
_LEVEL = 1e-6  # relative difference below which two times count as equal


@dataclass(frozen=True)
class Wishes:
    """What a setting has to keep to.

    Attributes:
        memory_bytes: memory of a device.
        accuracy: accuracy by K, as a difference to the backprop twin's, in points; empty if none is known. K = 1 is
            back-propagation, and loses nothing unless it was measured.
        loss: points that may be lost against the twin.
    """

    memory_bytes: float = math.inf
    accuracy: Mapping[int, float] = field(default_factory=dict)
    loss: float = 1.0

    def allow(self, each: Prediction) -> bool:
        """Whether a method keeps to them. Where accuracies are known, a K without one is not allowed. ``bp_async``
        never is: no pipeline of this package runs it, and its gradients are not those of the twin."""
        if each.memory_bytes > self.memory_bytes or each.method == "bp_async":
            return False
        if each.layers is None or not self.accuracy:
            return True
        return self.accuracy.get(each.layers, 0.0 if each.layers == 1 else -math.inf) >= -self.loss


def choose(predictions: Sequence[Prediction], wishes: Wishes | None = None) -> Prediction | None:
    """Returns the prediction to use: the one with the least time per micro-batch that keeps to the wishes, and among
    equally fast ones the most exact, back-propagation, then the least K. ``None`` if there is none."""
    able = [each for each in predictions if (wishes or Wishes()).allow(each)]
    least = min(map(_pace, able), default=0.0)
    level = [each for each in able if _pace(each) <= least * (1 + _LEVEL)]
    return min(level, key=lambda each: (each.layers or 0, each.micro_batches), default=None)


def _pace(each: Prediction) -> float:
    return each.seconds / each.micro_batches


def advice(
    predictions: Sequence[Prediction],
    work: Work,
    *,
    even: int | None,
    wishes: Wishes | None = None,
) -> str:
    """Returns advice which method to use, in one or two sentences.

    Args:
        predictions: predictions for one P and M.
        work: cost of the network.
        even: result of :func:`break_even`.
        wishes: what the method has to keep to.
    """
    best = choose(predictions, wishes)
    streaming = next(each for each in predictions if each.method == "streaming")
    bp = next(each for each in predictions if each.method == "bp_1f1b")
    setting = f"P = {bp.stages}, M = {bp.micro_batches}, rho = {work.rho:.3g}, u = {1000 * work.step:.3g} ms"
    turn = "at any M" if even is None else f"up to M = {even - 1}" if even > 1 else "at no M"
    against = (
        f"Streaming is {bp.seconds / streaming.seconds:.2f} times as fast as 1F1B here, and faster {turn}"
        f"{f' (the break-even is M = {even})' if even is not None else ''}."
    )
    if best is None:
        return f"{setting}: nothing keeps to the limits of memory and accuracy: use more stages. {against}"
    if best.layers is not None:
        rest = min((each for each in predictions if each.method in _NAMES), key=attrgetter("seconds"))
        slower = rest.seconds / best.seconds
        return (
            f"{setting}: use {_setting(best)}; the best back-propagation, {rest.method}, takes {slower:.2f} times as "
            f"long{_fits(rest, wishes)}. {against}"
        )
    slower = streaming.seconds / best.seconds
    return (
        f"{setting}: do not use streaming here, use {_NAMES[best.method]}; streaming takes {slower:.2f} times as long"
        f"{_fits(streaming, wishes)}. {against}"
    )


def _fits(each: Prediction, wishes: Wishes | None) -> str:
    return " and does not fit" if wishes and each.memory_bytes > wishes.memory_bytes else ""


def _setting(each: Prediction) -> str:
    """Names a method with AL layers."""
    if not each.schedule:
        return each.method
    sizes = sorted(set(group_sizes(each.stages, each.layers or 1)))
    stages = " or ".join(map(str, sizes))
    return f"K = {each.layers} with {each.schedule} in {'groups' if each.layers != 1 else 'one group'} of {stages}"


def best_of_all(predictions: Sequence[Prediction], wishes: Wishes, *, micro_batch: int | None = None) -> list[str]:
    """Returns sentences on the best P, K, schedule and M of all predictions, and on the best of the other kind, AL or
    back-propagation.

    Args:
        predictions: predictions for all P and M.
        wishes: what the setting has to keep to.
        micro_batch: samples of a micro-batch, to tell samples per second.
    """
    best = choose(predictions, wishes)
    if best is None:
        return ["Nothing keeps to the limits: use more stages, or allow more memory or a greater loss of accuracy."]
    use = f"use {_NAMES[best.method]}: " if best.layers is None else ""
    lines = [f"Best of all: {use}{_told(best, wishes, micro_batch)}."]
    other = choose([each for each in predictions if (each.layers is None) != (best.layers is None)], wishes)
    if other is not None:
        kind = "AL" if best.layers is None else "back-propagation"
        slower = _pace(other) / _pace(best)
        lines.append(f"The best {kind}: {_told(other, wishes, micro_batch)}; {slower:.2f} times as long.")
    late = min((each for each in predictions if each.method == "bp_async"), key=_pace, default=best)
    if _pace(late) < _pace(best) * (1 - _LEVEL):
        share = _pace(late) / _pace(best)
        lines.append(f"bp_async, by its formula, would take {share:.2f} of that time, with gradients a step late.")
    return [*lines, *_accuracy_notes(predictions, wishes)]


def _told(each: Prediction, wishes: Wishes, micro_batch: int | None) -> str:
    parts = [
        each.method if each.layers is None else _setting(each),
        f"P = {each.stages}",
        f"M = {each.micro_batches}",
        f"{1000 * _pace(each):.4g} ms per micro-batch",
        *([f"{micro_batch / _pace(each):,.0f} samples/s"] if micro_batch else []),
        f"{each.memory_bytes / 1e6:,.0f} MB on the fullest stage",
    ]
    if each.layers is not None and each.layers in wishes.accuracy:
        parts.append(f"{wishes.accuracy[each.layers]:+.2f} points to the twin")
    return ", ".join(parts)


def _accuracy_notes(predictions: Sequence[Prediction], wishes: Wishes) -> list[str]:
    tried = sorted({each.layers for each in predictions if each.layers is not None})
    if not wishes.accuracy:
        return ["No accuracy over K is given (--accuracy). It falls with K on images; advice is by time and memory."]
    unknown = [str(k) for k in tried if k not in wishes.accuracy and k > 1]
    below = [str(k) for k in tried if wishes.accuracy.get(k, 0.0) < -wishes.loss]
    return [
        *([f"No accuracy is known at K = {', '.join(unknown)}: not advised."] if unknown else []),
        *([f"K = {', '.join(below)} loses more than {wishes.loss:g} points: not advised."] if below else []),
    ]


def summary(predictions: Sequence[Prediction], wishes: Wishes | None = None) -> list[str]:
    """Returns which method to use at each P, in a line that names the range of M for each."""
    lines = []
    for stages in dict.fromkeys(each.stages for each in predictions):
        own = [each for each in predictions if each.stages == stages]
        ranges: list[tuple[str, int, int]] = []
        for m in sorted({each.micro_batches for each in own}):
            best = choose([each for each in own if each.micro_batches == m], wishes)
            name = "nothing within the limits" if best is None else _NAMES.get(best.method, _setting(best))
            first = ranges.pop()[1] if ranges and ranges[-1][0] == name else m
            ranges.append((name, first, m))
        uses = (f"{name} at M = {a}" + (f" to {b}" if b > a else "") for name, a, b in ranges)
        lines.append(f"P = {stages}: {'; '.join(uses)}")
    return lines


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
