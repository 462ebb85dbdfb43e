"""Computes efficiency, speed-up and attainable time of the scaling studies from the times of each stage.

All computed times come from simulating the schedules (:func:`ds_al.planner.simulate`): equal stages give the ideal
time, measured stage times the attainable time.
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
    """Number of stages; of replicas with ``bp_dp``."""
    layers: int


@dataclass(frozen=True)
class StageRun:
    """Times of one stage in one timed run, in seconds."""

    start: float
    end: float
    """``start`` and ``end`` are wall clock times, shared by all ranks."""
    forward: float
    """Mean per micro-batch; this and the following times use the clock of the workload."""
    backward: float
    step: float
    """Mean per optimizer step."""
    engine: float
    """Everything else per micro-batch: messages, data loading, Python. 0 if it cannot be separated from waiting."""
    busy: float
    """Total of the run."""

    @property
    def cost(self) -> StageCost:
        """Cost for the simulator; the engine's time per micro-batch counts as part of the forward."""
        return StageCost(self.forward + self.engine, self.backward, self.step)


def schedule_seconds(method: str, costs: Sequence[StageCost], *, micro_batches: int, batches: int) -> float:
    """Returns the seconds of ``batches`` batches of M micro-batches on stages of these costs, without message times.

    Args:
        method: the schedule.
        costs: cost of each stage; with ``bp_dp`` of each replica; the replicas share the micro-batches.
        micro_batches: micro-batches per batch, M.
        batches: number of batches.
    """
    if method == data_parallel.METHOD:
        own = data_parallel.micro_batches_per_replica(micro_batches, len(costs))
        return max(schedule_seconds("bp_1f1b", [cost], micro_batches=own, batches=batches) for cost in costs)
    start, end = span(simulate(method, costs, micro_batches=micro_batches, batches=batches))
    return end - start


def equal_costs(case: Case, layer: StageCost) -> list[StageCost]:
    """Returns stage costs for layers of equal cost; a replica holds all layers."""
    held = case.layers if case.method == data_parallel.METHOD else case.layers / case.stages
    return [StageCost(held * layer.forward, held * layer.backward, held * layer.step)] * case.stages


def even_costs(costs: Sequence[StageCost]) -> list[StageCost]:
    """Returns the same total work, distributed evenly over the stages."""
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
    """Returns one row, without the columns that need other rows (:func:`with_speedups`).

    Args:
        repetitions: repetitions of this case, each with the runs of all stages.
        layer: cost of a layer, if known: the ideal then assumes equal stages of such layers; otherwise it distributes
            the measured compute evenly.
        measured: whether wall clock times are meaningful. If not, ``basis`` is ``"computed"``, and efficiency and
            speed-up use ``attainable_seconds``.
        data: description of the training data.

    Returns:
        ``study, workload, data, method, stages, layers, micro_batches, batches, repeats``; medians over the repetitions
        of ``seconds`` (with ``seconds_min, seconds_max``), from the first stage's start to the last one's end;
        ``ideal``; ``busy_seconds`` of the slowest stage and ``busy_by_stage``; ``engine_ms``, the maximum over stages
        per micro-batch; ``attainable_seconds``, computed from the measured stage times; ``basis``; ``efficiency``, the
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

    Speed-up is relative to the same layers on one stage with the same method and number of batches, both on the row's
    basis: the strong study measures that time, the weak study multiplies the time of one layer. ``None`` if one stage
    was not timed.
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
