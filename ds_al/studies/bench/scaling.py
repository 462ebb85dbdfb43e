"""Measures weak scaling (k layers on k stages) and strong scaling (a fixed number of layers) on this machine."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from deepspeed import comm as dist

from ds_al.baseline import data_parallel
from ds_al.errors import ALConfigError
from ds_al.launch.ranks import run_ranks, tell
from ds_al.models import build_al
from ds_al.partition.layer_times import measure
from ds_al.planner import StageCost
from ds_al.studies.bench import workloads
from ds_al.studies.bench.cases import START_UP, train, world_size
from ds_al.studies.bench.scaling_rows import (
    Case,
    Row,
    StageRun,
    equal_costs,
    scaling_row,
    schedule_seconds,
    with_speedups,
)
from ds_al.studies.bench.texts import CLASSES, Texts
from ds_al.trace import Recorder
from ds_al.trace.analysis import computing

METHODS = ("streaming", "forward_first", "bp_1f1b", "bp_gpipe", "bp_naive", data_parallel.METHOD)
STUDIES = ("weak", "strong")
RANK_START = 5.0
"""Core seconds that a rank usually takes to start, for estimates."""


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class ScalingCases:
    """Cases to measure."""

    studies: Sequence[str]
    methods: Sequence[str]
    weak: Sequence[int]
    """Numbers of stages of the weak study, with as many layers as stages."""
    strong: Sequence[int]
    """Numbers of stages of the strong study, with :attr:`layers` layers in total."""
    layers: int
    micro_batches: int
    """Micro-batches per batch, M."""
    batches: int
    """Consecutive batches of ``streaming``, whose pipeline stays full between batches."""
    drained_batches: int
    """Consecutive batches of the other methods, whose batches all take the same time."""
    repeat: int
    """Number of repetitions per case; repetitions of different methods alternate."""
    layer: StageCost
    """Seconds of a layer: its sleep, or for a network an estimate, used to predict the duration of the measurement."""
    texts: Texts | None = None
    """Training data of a Transformer; ``None`` means sleeping layers."""

    def __post_init__(self) -> None:
        for stages in self.strong:
            if "strong" in self.studies and self.layers % stages:
                raise ALConfigError(
                    f"got {self.layers} layers for {stages} stages: expected a number that divides them"
                )

    @property
    def workload(self) -> str:
        """Name of the workload in the rows."""
        return "sleeping" if self.texts is None else "transformer"

    def worlds(self) -> Iterator[tuple[str, int, int]]:
        """Yields ``(study, stages, layers)`` of each set of ranks."""
        for study in self.studies:
            for stages in self.weak if study == "weak" else self.strong:
                yield study, stages, stages if study == "weak" else self.layers

    def batches_of(self, method: str) -> int:
        """Returns the number of batches of a timed run."""
        return self.batches if method == "streaming" else self.drained_batches

    def measured(self, stages: int) -> bool:
        """Whether wall clock times are meaningful: each stage that computes needs a core; sleeping stages need none."""
        return self.texts is None or stages <= cores()

    def case_seconds(self, case: Case) -> float:
        """Estimates the seconds of one repetition of a case on this machine."""
        ideal = schedule_seconds(
            case.method,
            equal_costs(case, self.layer),
            micro_batches=self.micro_batches,
            batches=self.batches_of(case.method),
        )
        return ideal if self.measured(case.stages) else ideal * case.stages / cores()

    def world_seconds(self, study: str, stages: int, layers: int) -> float:
        """Estimates the seconds of all repetitions of all methods on one set of ranks, including start-up."""
        cases = [Case(study, method, stages, layers) for method in self.methods]
        return (
            2 * RANK_START
            + stages * RANK_START / cores()
            + self.repeat * sum(self.case_seconds(case) for case in cases)
        )

    def total_seconds(self) -> float:
        """Estimates the seconds of the whole measurement."""
        return sum(self.world_seconds(*world) for world in self.worlds())

    def engine(self, method: str, *, stages: int, layers: int) -> Any:
        """Builds this rank's engine."""
        if self.texts is None:
            return workloads.sleeping_engine(
                method, stages=stages, layers=layers, forward=self.layer.forward, backward=self.layer.backward
            )
        # As in the published study, an embedding comes first, on the first stage in addition to its equal share.
        starts = [1 + stage * layers // stages for stage in range(1, stages)]
        return workloads.model_engine(
            method,
            model="transformer",
            stages=stages,
            micro_batch=len(self.texts.micro_batches[0][1]),
            options=transformer_options(self.texts, layers),
            partition=f"cuts:{','.join(map(str, starts))}" if starts else "uniform",
            optimizer=workloads.ADAMW,
        )

    def data(self, engine: Any) -> Iterator[Any]:
        """Yields micro-batches endlessly for an engine of :meth:`engine`: the share of its replica."""
        if self.texts is None:
            return workloads.micro_batches(engine)
        endless = itertools.cycle(self.texts.micro_batches)
        if engine.dp_world_size == 1:
            return endless
        return data_parallel.share(endless, replica=dist.get_rank(), replicas=engine.dp_world_size)


def transformer_options(texts: Texts, layers: int) -> dict[str, Any]:
    """Returns the options of both forms of the small Transformer: an embedding and this number of encoder layers."""
    length = texts.micro_batches[0][0][0].shape[1]
    sizes = {"vocab_size": texts.vocab_size, "num_classes": CLASSES, "max_length": length}
    return {"preset": "small", "num_blocks": layers + 1, **sizes}


def encoder_seconds(texts: Texts) -> StageCost:
    """Measures one AL encoder layer in this process, for estimates."""
    specs = build_al("transformer", **transformer_options(texts, 1))
    x, _ = texts.micro_batches[0]
    with torch.random.fork_rng(devices=[]):
        *_, layer = measure(
            lambda index: specs[index].build(),
            layers=2,
            example=x,
            num_classes=CLASSES,
            device=torch.device("cpu"),
            repeat=3,
        )
    return StageCost(layer.forward, layer.backward, layer.step)


def measure_scaling(
    cases: ScalingCases, *, progress: Callable[[Case, float, list[Row]], None] | None = None
) -> list[Row]:
    """Measures all cases.

    Args:
        progress: called after every repetition of a case, with the case, its seconds and all rows so far.

    Returns:
        Rows as :func:`~ds_al.studies.bench.scaling_rows.scaling_row` describes them, with speed-ups.

    Raises:
        RankFailure: a rank failed.
    """
    runs: dict[Case, list[list[StageRun]]] = {}

    rows: dict[Case, Row] = {}  # cached: each row needs a simulation on a core that the measured ranks use
    for study, stages, layers in cases.worlds():

        def news(line: str, study: str = study, stages: int = stages, layers: int = layers) -> None:
            told = json.loads(line)
            case = Case(study, told["method"], stages, layers)
            runs.setdefault(case, []).append([StageRun(**run) for run in told["runs"]])
            rows[case] = _row(cases, case, runs[case])
            if progress is not None:
                latest = runs[case][-1]
                progress(
                    case,
                    max(run.end for run in latest) - min(run.start for run in latest),
                    with_speedups(list(rows.values())),
                )

        run_ranks(
            f"{__name__}:time_on_rank",
            stages,
            timeout=2 * START_UP + 5 * cases.world_seconds(study, stages, layers),
            news=news,
            cases=cases,
            layers=layers,
        )
    return with_speedups(list(rows.values()))


def _row(cases: ScalingCases, case: Case, repetitions: Sequence[Sequence[StageRun]]) -> Row:
    return scaling_row(
        case,
        repetitions,
        workload=cases.workload,
        micro_batches=cases.micro_batches,
        batches=cases.batches_of(case.method),
        layer=cases.layer if cases.texts is None else None,
        measured=cases.measured(case.stages),
        data="none" if cases.texts is None else cases.texts.origin,
    )


# ---- functions that run on each rank -----------------------------------------------------------------


def time_on_rank(cases: ScalingCases, layers: int) -> None:
    """Times all methods alternately; after each run the first rank sends the results of all ranks."""
    world = world_size()
    engines = {method: cases.engine(method, stages=world, layers=layers) for method in cases.methods}
    data = {method: cases.data(engine) for method, engine in engines.items()}
    for method, engine in engines.items():  # the first batch sends shapes, starts threads, allocates memory
        train(engine, data[method], micro_batches=1, batches=1 if cases.texts is None else 3)
    for _ in range(cases.repeat):
        for method, engine in engines.items():
            run = _timed(engine, data[method], cases=cases, batches=cases.batches_of(method))
            everyone: list[Any] = [None] * world
            dist.all_gather_object(everyone, asdict(run))
            if dist.get_rank() == 0:
                tell(json.dumps({"method": method, "runs": everyone}))


def _timed(engine: Any, data: Iterator[Any], *, cases: ScalingCases, batches: int) -> StageRun:
    """Times one run; networks are timed by the processor time of this process, which excludes waiting."""
    by_processor = cases.texts is not None
    engine.recording.recorder = recorder = Recorder(engine.stage_id)
    recorder.mark = time.process_time if by_processor else time.perf_counter
    before = time.process_time()
    start, end = train(engine, data, micro_batches=cases.micro_batches, batches=batches)
    processor = time.process_time() - before
    engine.recording.recorder = None
    events = computing(recorder.events)
    times = {
        name: [event.seconds for event in events if event.instruction == instruction]
        for name, instruction in _INSTRUCTIONS.items()
    }
    compute = sum(sum(each) for each in times.values())
    engine_seconds = max(processor - compute, 0.0) if by_processor else 0.0
    return StageRun(
        start=start,
        end=end,
        **{name: statistics.fmean(each) for name, each in times.items()},
        engine=engine_seconds / len(times["forward"]),
        busy=compute + engine_seconds,
    )


_INSTRUCTIONS = {"forward": "ForwardPass", "backward": "BackwardPass", "step": "OptimizerStep"}
