"""Runs the measurements on ranks of this machine and converts their results into rows.

``measure_*`` starts the ranks; the functions that a rank runs follow below. All cases with the same number of stages
share one set of ranks, since ranks take seconds to start.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from deepspeed import comm as dist

from ds_al.baseline.data_parallel import micro_batches_per_replica
from ds_al.launch.ranks import run_ranks, tell
from ds_al.parallel.world import join_world
from ds_al.planner.formulas import ideal_seconds
from ds_al.studies.bench import workloads
from ds_al.studies.bench.recomputed import measure_recomputed
from ds_al.trace import ActivationMeter

Row = dict[str, Any]
START_UP = 120.0  # seconds allowed for starting a set of ranks


@dataclass(frozen=True)
class SleepingCases:
    """Cases to time: every method with every number of stages and micro-batches."""

    methods: Sequence[str]
    stages: Sequence[int]
    micro_batches: Sequence[int]
    batches: int
    forward: float
    """Seconds that a layer sleeps in its forward pass."""
    backward: float
    """Seconds that a layer sleeps in its backward pass."""
    repeat: int
    """Number of repetitions per case; repetitions of different cases alternate."""

    def ideal(self, method: str, *, stages: int, micro_batches: int) -> float:
        """Returns the seconds of one case if only the sleeping layers took time."""
        return ideal_seconds(
            method,
            stages=stages,
            micro_batches=micro_batches,
            batches=self.batches,
            forward=self.forward,
            backward=self.backward,
        )

    def total_seconds(self, *, stages: int) -> float:
        """Returns the ideal seconds of all cases with this number of stages, including repetitions."""
        pairs = [(method, m) for method in self.methods for m in self.micro_batches]
        return self.repeat * sum(self.ideal(method, stages=stages, micro_batches=m) for method, m in pairs)


def measure_sleeping(cases: SleepingCases, *, progress: Callable[[Row], None] | None = None) -> list[Row]:
    """Times all cases.

    A case lasts from a barrier before its first batch until the last stage has finished its last batch.
    A short untimed batch precedes the first case.

    Args:
        progress: called after every timed case with its ``method, stages, micro_batches, ideal`` and the last
            stage's ``seconds``.

    Returns:
        Rows with ``method, stages, micro_batches, batches, seconds`` (median), ``seconds_min, seconds_max,
        ideal, efficiency`` (ideal / seconds).

    Raises:
        RankFailure: a rank failed.
    """
    rows = []
    for stages in cases.stages:

        def news(line: str, stages: int = stages) -> None:
            method, m, seconds = line.split()
            row = {"method": method, "stages": stages, "micro_batches": int(m), "seconds": float(seconds)}
            if progress is not None:
                progress({**row, "ideal": cases.ideal(method, stages=stages, micro_batches=int(m))})

        by_rank = run_ranks(
            f"{__name__}:time_sleeping",
            stages,
            timeout=START_UP + 3 * cases.total_seconds(stages=stages),
            news=news,
            cases=cases,
        )
        for method, m in by_rank[0]:
            spans = [rank[method, m] for rank in by_rank]
            seconds = [
                max(end for _, end in repetition) - min(start for start, _ in repetition)
                for repetition in zip(*spans, strict=True)
            ]
            median, ideal = statistics.median(seconds), cases.ideal(method, stages=stages, micro_batches=m)
            rows.append(
                {
                    "method": method,
                    "stages": stages,
                    "micro_batches": m,
                    "batches": cases.batches,
                    "seconds": median,
                    "seconds_min": min(seconds),
                    "seconds_max": max(seconds),
                    "ideal": ideal,
                    "efficiency": ideal / median,
                }
            )
    return rows


def measure_memory(
    *,
    methods: Sequence[str],
    stages: Sequence[int],
    micro_batches: Sequence[int],
    width: int,
    micro_batch: int,
    progress: Callable[[int], None] | None = None,
) -> list[Row]:
    """Measures the peak memory that autograd holds for backward, on every stage, in one batch of dense layers.

    Args:
        width: width of the dense layers.
        micro_batch: samples per micro-batch.
        progress: called with each number of stages after its measurement.

    Returns:
        Rows ``workload, method, stages, micro_batches, stage, layers, checkpoint_interval, peak_bytes, peak_tensors``
        of the dense layers, followed by those of :func:`~ds_al.studies.bench.recomputed.measure_recomputed`.

    Raises:
        RankFailure: a rank failed.
    """
    rows: list[Row] = []
    for count in stages:
        by_rank = run_ranks(
            f"{__name__}:count_memory",
            count,
            timeout=4 * START_UP,
            methods=methods,
            micro_batches=micro_batches,
            width=width,
            micro_batch=micro_batch,
        )
        for method, m in by_rank[0]:
            for stage, peaks in enumerate(by_rank):
                nbytes, tensors = peaks[method, m]
                row = {
                    "workload": "dense",
                    "layers": count,
                    "checkpoint_interval": 0,
                    "method": method,
                    "stages": count,
                }
                row |= {"micro_batches": m, "stage": stage, "peak_bytes": nbytes, "peak_tensors": tensors}
                rows.append(row)
        if progress is not None:
            progress(count)
    one_stage = {"workload": "transformer", "method": "streaming", "stages": 1, "micro_batches": 1, "stage": 0}
    return rows + [{**one_stage, **row} for row in measure_recomputed(micro_batch=micro_batch)]


# ---- functions that run on each rank -----------------------------------------------------------------


def time_sleeping(cases: SleepingCases) -> dict[tuple[str, int], list[tuple[float, float]]]:
    """Returns start and end of every repetition on this rank, in seconds of the clock that all ranks share."""
    world = world_size()
    engines = {
        method: workloads.sleeping_engine(method, stages=world, forward=cases.forward, backward=cases.backward)
        for method in cases.methods
    }
    for engine in engines.values():
        train(
            engine, workloads.micro_batches(engine), micro_batches=2, batches=1
        )  # the first batch sends shapes and starts threads
    pairs = [(method, m) for m in cases.micro_batches for method in cases.methods]
    spans: dict[tuple[str, int], list[tuple[float, float]]] = {pair: [] for pair in pairs}
    for _ in range(cases.repeat):
        for method, m in pairs:
            start, end = train(
                engines[method], workloads.micro_batches(engines[method]), micro_batches=m, batches=cases.batches
            )
            spans[method, m].append((start, end))
            if dist.get_rank() == world - 1:
                tell(f"{method} {m} {end - start}")
    return spans


def count_memory(
    methods: Sequence[str], micro_batches: Sequence[int], width: int, micro_batch: int
) -> dict[tuple[str, int], tuple[int, int]]:
    """Returns the peak bytes and tensors on this rank."""
    peaks = {}
    for method in methods:
        engine = workloads.dense_engine(method, stages=world_size(), width=width, micro_batch=micro_batch)
        for m in micro_batches:
            with ActivationMeter(exclude=engine.module.parameters()) as meter:
                train(engine, workloads.micro_batches(engine, width=width), micro_batches=m, batches=1)
            peaks[method, m] = meter.peak_bytes, meter.peak_tensors
    return peaks


def train(engine: Any, data: Iterator[Any], *, micro_batches: int, batches: int) -> tuple[float, float]:
    """Trains without any communication between the stages except the engine's own messages.

    Args:
        engine: the engine of this rank.
        data: its micro-batches.
        micro_batches: micro-batches of a whole batch, M; data parallel replicas share them.
        batches: number of batches.

    Returns:
        Start and end in seconds.
    """
    replicas = engine.dp_world_size
    own = micro_batches_per_replica(micro_batches, replicas)
    engine.set_train_batch_size(own * replicas * engine.train_micro_batch_size_per_gpu())
    dist.barrier()
    start = time.perf_counter()
    for _ in range(batches):
        engine.train_batch(data)
    return start, time.perf_counter()


def world_size() -> int:
    """Returns the number of ranks, and initializes the process group first if necessary."""
    join_world()
    return dist.get_world_size()
