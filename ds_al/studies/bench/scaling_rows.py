"""The maths of the scaling studies: from what each stage did to time beside the ideal, speed-up, attainable time.

Every time that is computed comes from the schedules themselves, run on stages of given times
(:func:`ds_al.planner.simulate`): equal stages give the ideal, the measured ones what can be attained.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ds_al.baseline import data_parallel
from ds_al.planner import StageCost, simulate
from ds_al.trace.analysis import span

Row = dict[str, Any]


class Case(NamedTuple):
    """One method on one size of one study."""

    study: str
    """``"weak"``: as many layers as stages. ``"strong"``: the same layers on any number of stages."""
    method: str
    stages: int
    """Or replicas, with ``bp_dp``."""
    layers: int


@dataclass(frozen=True)
class StageRun:
    """What one stage did in one timed run. Seconds."""

    start: float
    end: float
    """Of the wall clock, which all ranks share."""
    forward: float
    """Of one micro-batch, mean; this and what follows by the clock that the workload is measured with."""
    backward: float
    step: float
    """Of one optimizer step, mean."""
    engine: float
    """Of all else per micro-batch: messages, loading, Python. 0 where it cannot be told from waiting."""
    busy: float
    """Of the whole run."""

    @property
    def cost(self) -> StageCost:
        """For the simulator. What the engine does for a micro-batch counts as part of its forward."""
        return StageCost(self.forward + self.engine, self.backward, self.step)


def schedule_seconds(method: str, costs: Sequence[StageCost], *, micro_batches: int, batches: int) -> float:
    """How long ``batches`` batches of M micro-batches take on stages of these costs, if messages take no time.

    Args:
        costs: of each stage; with ``bp_dp`` of each replica, which shares the micro-batches with the others.
    """
    if method == data_parallel.METHOD:
        own = data_parallel.micro_batches_per_replica(micro_batches, len(costs))
        return max(schedule_seconds("bp_1f1b", [cost], micro_batches=own, batches=batches) for cost in costs)
    start, end = span(simulate(method, costs, micro_batches=micro_batches, batches=batches))
    return end - start


def equal_costs(case: Case, layer: StageCost) -> list[StageCost]:
    """Those of stages whose layers all cost the same; a replica holds all layers."""
    held = case.layers if case.method == data_parallel.METHOD else case.layers / case.stages
    return [StageCost(held * layer.forward, held * layer.backward, held * layer.step)] * case.stages


def even_costs(costs: Sequence[StageCost]) -> list[StageCost]:
    """The same work in all, spread evenly over the stages."""
    return [
        StageCost(
            statistics.fmean(cost.forward for cost in costs),
            statistics.fmean(cost.backward for cost in costs),
            statistics.fmean(cost.step for cost in costs),
        )
    ] * len(costs)


def scaling_row(
    case: Case,
    repetitions: Sequence[Sequence[StageRun]],
    *,
    workload: str,
    micro_batches: int,
    batches: int,
    layer: StageCost | None,
    measured: bool,
    data: str,
) -> Row:
    """One row, without what needs other rows (:func:`with_speedups`).

    Args:
        repetitions: of this case, each with the runs of all stages.
        layer: known cost of a layer, where it has one: then the ideal is that of equal stages of such layers, else
            of the measured compute, spread evenly.
        measured: whether the wall clock says how long the schedule takes. If not, ``basis`` is ``"computed"``, and
            efficiency and speed-up are of ``attainable_seconds``.
        data: what was trained on.

    Returns:
        ``study, workload, data, method, stages, layers, micro_batches, batches, repeats``; medians over the repetitions
        of ``seconds`` (with ``seconds_min, seconds_max``), from the first stage's start to the last one's end;
        ``ideal``; ``busy_seconds`` of the slowest stage and ``busy_by_stage``; ``engine_ms``, per micro-batch, of the
        stage with most of it; ``attainable_seconds``, computed from the stages' own times; ``basis``; ``efficiency``,
        ideal over the seconds of that basis.
    """
    seconds = [max(run.end for run in runs) - min(run.start for run in runs) for runs in repetitions]
    costs = [_median_cost(stage) for stage in zip(*repetitions, strict=True)]
    compute = [_median_cost(stage, engine=False) for stage in zip(*repetitions, strict=True)]
    busy = [statistics.median(run.busy for run in stage) for stage in zip(*repetitions, strict=True)]
    engine = [statistics.median(run.engine for run in stage) for stage in zip(*repetitions, strict=True)]
    size = {"micro_batches": micro_batches, "batches": batches}
    wanted = equal_costs(case, layer) if layer is not None else even_costs(compute)
    ideal = schedule_seconds(case.method, wanted, **size)
    attainable = schedule_seconds(case.method, costs, **size)
    median = statistics.median(seconds)
    return {
        "study": case.study,
        "workload": workload,
        "data": data,
        "method": case.method,
        "stages": case.stages,
        "layers": case.layers,
        **size,
        "repeats": len(repetitions),
        "seconds": median,
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "ideal": ideal,
        "busy_seconds": max(busy),
        "busy_by_stage": busy,
        "engine_ms": 1000 * max(engine),
        "attainable_seconds": attainable,
        "basis": "measured" if measured else "computed",
        "efficiency": ideal / (median if measured else attainable),
    }


def with_speedups(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Adds ``speedup`` and ``parallel_efficiency`` (speed-up over stages).

    Speed-up is against the same layers on one stage by the same method, for the same number of batches, both on the
    row's basis: measured in the strong study, in the weak one as many times as long as the one layer that was. ``None``
    where one stage was not timed.
    """
    ones = {(row["study"], row["workload"], row["method"]): row for row in rows if row["stages"] == 1}
    full = []
    for row in rows:
        one = ones.get((row["study"], row["workload"], row["method"]))
        column = "seconds" if row["basis"] == "measured" else "attainable_seconds"
        alone = one and one[column] / one["batches"] * row["layers"] / one["layers"]
        speedup = alone and alone / (row[column] / row["batches"])
        full.append({**row, "speedup": speedup, "parallel_efficiency": speedup and speedup / row["stages"]})
    return full


def _median_cost(runs: Sequence[StageRun], *, engine: bool = True) -> StageCost:
    costs = [run.cost if engine else StageCost(run.forward, run.backward, run.step) for run in runs]
    return StageCost(*(statistics.median(getattr(cost, name) for cost in costs) for name in _COST))


_COST = ("forward", "backward", "step")
