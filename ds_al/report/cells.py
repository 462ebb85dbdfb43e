"""Groups runs that differ only in their seed into cells, with mean and standard deviation over the seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ds_al.figures.palette import series_of
from ds_al.report.read import RunRecord

_NOUNS = {
    "stages": ("stage", "stages"),
    "layers": ("layer", "layers"),
    "micro_batches": ("micro-batch", "micro-batches"),
}


@dataclass(frozen=True)
class Statistic:
    """Mean and sample standard deviation (n - 1) of the recorded values; ``sd`` is ``None`` for one value."""

    mean: float | None
    sd: float | None
    n: int


@dataclass(frozen=True)
class Cell:
    """Runs of the same model, data, method, stages, layers, schedule inside a group and micro-batches.

    Attributes:
        label: the method, and the other factors that distinguish this cell from the others of a report.
        runs: all runs, including unfinished ones.
    """

    label: str
    runs: list[RunRecord]

    @property
    def first(self) -> RunRecord:
        """A run of the cell, a finished one if possible."""
        return self.shown[0]

    @property
    def finished(self) -> list[RunRecord]:
        """The finished runs, over which means are computed."""
        return [run for run in self.runs if run.finished]

    @property
    def shown(self) -> list[RunRecord]:
        """The runs whose curves are drawn: the finished runs, or all if there are none."""
        return self.finished or self.runs

    def over_seeds(self, value_of: Callable[[RunRecord], float | None]) -> Statistic:
        """Returns mean and standard deviation of a value over the finished runs that recorded it."""
        return statistic([value_of(run) for run in self.finished])

    def per_stage(self, key: str) -> list[Statistic]:
        """Returns mean and standard deviation per stage of a fact; empty if no run recorded it."""
        rows = [run.stage_values(key) for run in self.finished]
        stages = max(map(len, rows), default=0)
        found = [statistic([row[stage] for row in rows if stage < len(row)]) for stage in range(stages)]
        return found if any(one.n for one in found) else []


def statistic(values: Sequence[float | None]) -> Statistic:
    """Returns mean and standard deviation of the values that are not ``None``."""
    known = [value for value in values if value is not None]
    return Statistic(
        mean=statistics.fmean(known) if known else None,
        sd=statistics.stdev(known) if len(known) > 1 else None,
        n=len(known),
    )


def group(runs: Sequence[RunRecord]) -> list[Cell]:
    """Groups runs into cells, in the order of their first runs; runs of a cell are sorted by seed."""
    by_key: dict[str, list[RunRecord]] = {}
    for run in runs:
        by_key.setdefault(json.dumps(_factors(run), sort_keys=True, default=str), []).append(run)
    groups = [sorted(found, key=lambda run: (run.seed is None, run.seed)) for found in by_key.values()]
    labels = _labels([_factors(found[0]) for found in groups])
    return [Cell(label=label, runs=found) for label, found in zip(labels, groups, strict=True)]


def styled(cells: Sequence[Cell]) -> list[tuple[int, Cell]]:
    """Returns each cell with its style index, which is that of its method if possible."""
    return list(zip(series_of([cell.first.method for cell in cells]), cells, strict=True))


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested keys to ``a.b.c``."""
    found: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            found |= flat(inner, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = inner
    return found


def _factors(run: RunRecord) -> dict[str, Any]:
    data = {key: value for key, value in run.data.items() if key != "eval_batch_size"}
    return {
        "method": run.method,
        "model": run.model,
        "data": data,
        "stages": run.value("stages"),
        "layers": run.layers,
        "group_schedule": run.value("group_schedule"),
        "micro_batches": run.value("micro_batches"),
    }


def _labels(factors: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns labels: the method, and every other factor in which the cells differ."""
    rows = [flat(row) for row in factors]
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key != "method"]
    varying = [key for key in keys if len({json.dumps(row.get(key), default=str) for row in rows}) > 1]
    methods = {(row["method"], row["layers"]) for row in rows}
    if "layers" in varying and len(methods) == len({method for method, _ in methods}):
        varying.remove("layers")  # differs with the method, since a twin counts its classifier as a layer
    return [", ".join([row["method"], *filter(None, (_part(key, row.get(key)) for key in varying))]) for row in rows]


def _part(key: str, value: Any) -> str:
    if key == "group_schedule":
        return value or ""
    if key in _NOUNS:
        one, many = _NOUNS[key]
        return f"{many} not recorded" if value is None else f"{value} {one if value == 1 else many}"
    if key.endswith(".name"):
        return str(value)
    return f"{key.split('.')[-1]} {'default' if value in (None, {}, []) else value}"
