"""Compares methods with the twin along the training: after the same samples, the same operations, the same time.

The curves are those of the validation accuracy after each epoch. All methods of a group have one learning-rate schedule
over all epochs, so a point before the end is not what a shorter schedule would have reached.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from ds_al.studies.sweep.table import times_count, twins_of

Result = Mapping[str, Any]
Row = dict[str, Any]

SHARES = (0.25, 0.5, 0.75, 1.0)
LEVEL = 0.003
"""Difference of accuracies, 0.3 points, up to which a method is level with the twin."""


def samples(result: Result) -> list[float]:
    """Returns the epochs that were evaluated, a measure of samples."""
    return [float(epoch["epoch"]) for epoch in _evaluated(result)]


def operations(result: Result) -> list[float]:
    """Returns the operations until then, in epochs of the twin; empty if they were not counted."""
    rho = 1.0 if result["K"] is None else result.get("rho")  # the twin records the rho of its AL form
    return [] if rho is None else [epoch * rho for epoch in samples(result)]


def seconds(result: Result) -> list[float]:
    """Returns the seconds of training until then."""
    total = list(accumulate(epoch["seconds"] for epoch in result["history"]))
    return [total[place] for place, epoch in enumerate(result["history"]) if epoch.get("validation_accuracy")]


MEASURES: dict[str, Callable[[Result], list[float]]] = {
    "samples": samples,
    "operations": operations,
    "seconds": seconds,
}


def along(results: Sequence[Result]) -> list[Row]:
    """Returns rows ``group, method, K, by, share, seeds, difference, error, verdict``.

    ``difference`` is the validation accuracy minus the twin's, mean over seeds that both have, when each has spent that
    ``share`` of what the twin spends in all, of samples, operations or seconds (``by``); between epochs it is
    interpolated, and a method that has ended keeps its accuracy. ``error`` is its standard error (``None`` with one
    seed). ``verdict`` is ``"level"`` if the difference is at most 0.3 points, ``"open"`` if it is larger but at most
    twice its error, else ``"ahead"`` or ``"behind"``.

    Args:
        results: results of the runs; failed ones are omitted.
    """
    done = [result for result in results if "failure" not in result]
    twins = twins_of(done)
    found: dict[tuple[Any, ...], list[Result]] = {}
    for result in done:
        if result["K"] is not None and (result["group"], result["seed"]) in twins:
            found.setdefault((result["group"], result["suite_method"], result["K"]), []).append(result)
    rows = []
    for (group, method, layers), own in found.items():
        pairs = [(result, twins[group, result["seed"]]) for result in own]
        for by, measure in MEASURES.items():
            if not all(measure(result) and measure(twin) for result, twin in pairs):
                continue
            if by == "seconds" and not times_count(own, twins):
                continue
            for share in SHARES:
                apart = [_apart(result, twin, measure, share=share) for result, twin in pairs]
                known = [each for each in apart if each is not None]
                if len(known) == len(apart):
                    about = {"group": group, "method": method, "K": layers, "by": by, "share": share}
                    rows.append({**about, "seeds": len(known), **_judged(known)})
    return rows


def _apart(result: Result, twin: Result, measure: Callable[[Result], list[float]], *, share: float) -> float | None:
    """Returns the difference of accuracies at a share of the twin's total; ``None`` before a first evaluation."""
    (x, y), (twin_x, twin_y) = ((measure(r), _accuracy(r)) for r in (result, twin))
    place = share * twin_x[-1]
    if place < max(x[0], twin_x[0]):
        return None
    return float(np.interp(place, x, y) - np.interp(place, twin_x, twin_y))


def _judged(differences: Sequence[float]) -> Row:
    mean = statistics.mean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
    if abs(mean) <= LEVEL:
        verdict = "level"
    elif error is None or abs(mean) <= 2 * error:
        verdict = "open"
    else:
        verdict = "ahead" if mean > 0 else "behind"
    return {"difference": mean, "error": error, "verdict": verdict}


def _accuracy(result: Result) -> list[float]:
    return [float(epoch["validation_accuracy"][-1]) for epoch in _evaluated(result)]


def _evaluated(result: Result) -> list[Mapping[str, Any]]:
    return [epoch for epoch in result["history"] if epoch.get("validation_accuracy")]
