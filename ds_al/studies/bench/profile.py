"""Records runs of all methods and breaks down the time of every stage, compared with the bubble formula."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ds_al.launch.ranks import run_ranks, tell
from ds_al.planner import StageCost, simulate
from ds_al.planner.formulas import bubble_formula, ideal_seconds
from ds_al.planner.predict import SIMULATED
from ds_al.studies.bench import workloads
from ds_al.studies.bench.cases import START_UP, Row, train, world_size
from ds_al.trace import ActivationMeter, Event, Recorder
from ds_al.trace.analysis import CAUSES, bytes_sent, computing, critical_path, stage_times
from ds_al.trace.clock import ClockOffset
from ds_al.trace.files import merge

Runs = dict[tuple[str, int], list[list[Event]]]
"""Repetitions, as the events of all stages on one clock, by (method, micro-batches)."""


@dataclass(frozen=True)
class ProfileCases:
    """Cases to record: every method with every number of micro-batches, on one number of stages."""

    methods: Sequence[str]
    stages: int
    micro_batches: Sequence[int]
    batches: int
    repeat: int
    """Number of recordings per case; recordings of different cases alternate."""
    model: str | None
    """Name of a model of ``ds_al.models``; ``None`` means sleeping layers."""
    micro_batch: int
    """Samples per micro-batch of a model."""
    forward: float
    """Seconds of a sleeping layer's forward."""
    backward: float
    """Seconds of a sleeping layer's backward."""
    memory: bool = False
    """Whether to record memory as well, which takes time."""

    def engine(self, method: str) -> Any:
        """Builds this rank's engine."""
        if self.model is None:
            return workloads.sleeping_engine(method, stages=self.stages, forward=self.forward, backward=self.backward)
        return workloads.model_engine(method, model=self.model, stages=self.stages, micro_batch=self.micro_batch)

    def data(self, engine: Any) -> Iterator[Any]:
        """Returns micro-batches for an engine of :meth:`engine`."""
        if self.model is None:
            return workloads.micro_batches(engine)
        return workloads.model_batches(engine, model=self.model)

    @property
    def recordings(self) -> int:
        """Total number of recorded runs."""
        return len(self.pairs) * self.repeat

    @property
    def pairs(self) -> list[tuple[str, int]]:
        """``(method, M)`` of all cases; a method that needs more micro-batches than M is left out."""
        return [
            (method, m)
            for m in self.micro_batches
            for method in self.methods
            if m >= workloads.least_micro_batches(method, self.stages)
        ]

    def sleep_seconds(self) -> float:
        """Ideal seconds of all recordings of sleeping layers."""
        return self.repeat * sum(
            ideal_seconds(
                method,
                stages=self.stages,
                micro_batches=m,
                batches=self.batches,
                forward=self.forward,
                backward=self.backward,
            )
            for method, m in self.pairs
        )


def record_runs(cases: ProfileCases, *, progress: Callable[[str], None] | None = None) -> Runs:
    """Records all cases on ranks of this machine.

    Args:
        progress: called with a line after every recording.

    Raises:
        RankFailure: a rank failed.
    """
    by_rank = run_ranks(
        f"{__name__}:record_on_rank",
        cases.stages,
        timeout=4 * START_UP + 3 * cases.sleep_seconds(),
        news=progress,
        cases=cases,
    )
    clocks = [ClockOffset(0.0, 0.0)] * cases.stages  # ranks of one machine share a clock
    return {
        case: [merge(stages, clocks) for stages in zip(*(rank[case] for rank in by_rank), strict=True)]
        for case in by_rank[0]
    }


def record_on_rank(cases: ProfileCases) -> dict[tuple[str, int], list[list[Event]]]:
    """Runs on each rank: returns its events of every case and repetition."""
    world_size()
    engines = {method: cases.engine(method) for method in cases.methods}
    data = {method: cases.data(engine) for method, engine in engines.items()}
    for method, engine in engines.items():
        least = max(2, workloads.least_micro_batches(method, cases.stages))
        train(engine, data[method], micro_batches=least, batches=2)  # sends shapes, starts threads, allocates memory
    runs: dict[tuple[str, int], list[list[Event]]] = {pair: [] for pair in cases.pairs}
    for _ in range(cases.repeat):
        for method, m in cases.pairs:
            runs[method, m].append(_record(engines[method], data[method], micro_batches=m, cases=cases))
            if engines[method].is_last_stage():
                tell(f"{method}, {m} micro-batches")
    return runs


def _record(engine: Any, data: Iterator[Any], *, micro_batches: int, cases: ProfileCases) -> list[Event]:
    meter = ActivationMeter(exclude=engine.module.parameters()) if cases.memory else None
    if meter is not None:
        meter.__enter__()
    engine.recording.recorder = recorder = Recorder(engine.stage_id, device=engine.device, meter=meter)
    train(engine, data, micro_batches=micro_batches, batches=cases.batches)
    engine.recording.recorder = None
    if meter is not None:
        meter.__exit__(None, None, None)
    return recorder.events


def typical(runs: Sequence[Sequence[Event]]) -> Sequence[Event]:
    """Returns the repetition of median length."""
    return sorted(runs, key=lambda events: stage_times(events)[0].span)[(len(runs) - 1) // 2]


def profile_rows(runs: Runs, cases: ProfileCases) -> list[Row]:
    """Returns one row per method, number of micro-batches and stage; times and shares are medians over repetitions.

    Columns: ``workload, method, stages, micro_batches, batches, stage``; ``seconds`` of the run; the shares
    ``busy, wait_input, wait_queue, wait_data, wait_barrier, drained, other``
    (:class:`~ds_al.trace.analysis.StageTime`); ``bubble`` (1 - busy) with its minimum and maximum over the repetitions,
    ``bubble_formula`` (:func:`~ds_al.planner.formulas.bubble_formula` with the mean measured forward and backward of
    all stages) and ``difference``; ``bubble_simulated``, the bubble of the same schedule with each stage's own mean
    times (:func:`~ds_al.planner.simulate`), for unequal stages, or the formula's where it is not simulated;
    ``forward_ms, backward_ms, step_ms`` per micro-batch or step; ``bytes_per_micro_batch`` sent; ``critical_path``, the
    stage's share of the critical path; ``peak_bytes`` held for backward, if memory was recorded.
    """
    rows = []
    for (method, m), repetitions in runs.items():
        times = [stage_times(events) for events in repetitions]
        formula = statistics.median(_formula(method, m, events, cases) for events in repetitions)
        events = typical(repetitions)
        simulated = [formula] * cases.stages
        if method in SIMULATED:
            ideal = simulate(method, _costs(events, m, cases), micro_batches=m, batches=cases.batches)
            simulated = [each.bubble for each in stage_times(ideal)]
        for stage in range(cases.stages):
            own = [each[stage] for each in times]
            shares = {name: statistics.median(getattr(time, name) for time in own) for name in ("busy", *CAUSES)}
            bubbles = [time.bubble for time in own]
            bubble = statistics.median(bubbles)
            rows.append(
                {
                    "workload": cases.model or "sleeping",
                    "method": method,
                    "stages": cases.stages,
                    "micro_batches": m,
                    "batches": cases.batches,
                    "stage": stage,
                    "seconds": statistics.median(time.span for time in own),
                    **shares,
                    "bubble": bubble,
                    "bubble_min": min(bubbles),
                    "bubble_max": max(bubbles),
                    "bubble_formula": formula,
                    "difference": bubble - formula,
                    "bubble_simulated": simulated[stage],
                    **_instruction_times(events, stage, micro_batches=m * cases.batches),
                    "bytes_per_micro_batch": bytes_sent(events)[stage] / (m * cases.batches),
                    "critical_path": _critical_share(events, stage),
                    "peak_bytes": _peak(events, stage),
                }
            )
    return rows


def _formula(method: str, micro_batches: int, events: Sequence[Event], cases: ProfileCases) -> float:
    """Returns the bubble formula with the measured times; a step counts as part of the backward before it."""
    per_micro_batch = cases.stages * micro_batches * cases.batches
    forward = sum(event.seconds for event in computing(events) if event.instruction == "ForwardPass")
    rest = sum(event.seconds for event in computing(events)) - forward
    return bubble_formula(
        method,
        stages=cases.stages,
        micro_batches=micro_batches,
        batches=cases.batches,
        forward=forward / per_micro_batch,
        backward=rest / per_micro_batch,
    )


def _costs(events: Sequence[Event], micro_batches: int, cases: ProfileCases) -> list[StageCost]:
    total = micro_batches * cases.batches
    times = [_instruction_times(events, stage, micro_batches=total) for stage in range(cases.stages)]
    return [StageCost(t["forward_ms"] / 1000, t["backward_ms"] / 1000, t["step_ms"] / 1000) for t in times]


def _instruction_times(events: Sequence[Event], stage: int, *, micro_batches: int) -> dict[str, float]:
    """Returns milliseconds per micro-batch, in as many passes as there are, and per step."""
    own = [event for event in computing(events) if event.stage == stage]

    def seconds(start: str) -> list[float]:
        return [event.seconds for event in own if event.instruction.startswith(start)]

    return {
        "forward_ms": 1000 * sum(seconds("Forward")) / micro_batches,
        "backward_ms": 1000 * sum(seconds("Backward")) / micro_batches,
        "step_ms": 1000 * statistics.mean(seconds("OptimizerStep")),
    }


def _critical_share(events: Sequence[Event], stage: int) -> float:
    path = critical_path(events)
    return sum(event.seconds for event in path if event.stage == stage) / sum(event.seconds for event in path)


def _peak(events: Sequence[Event], stage: int) -> int | None:
    return max((event.memory for event in events if event.stage == stage and event.memory is not None), default=None)
