"""Times K layers on P stages, from exact back-propagation (K = 1) to streaming (K = P), on sleeping layers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from deepspeed import comm as dist

from ds_al.baseline import build
from ds_al.group_schedule import GROUP_SCHEDULES, group_graphs, group_seconds
from ds_al.launch.ranks import run_ranks, tell
from ds_al.planner.formulas import group_fill, held_graphs, ideal_seconds
from ds_al.studies.bench import workloads
from ds_al.studies.bench.cases import START_UP, train, world_size
from ds_al.studies.bench.interleaved import Span, turns

Row = dict[str, Any]
Key = tuple[str, int, int]
"""Schedule or method, K, M."""
RIVALS = ("bp_1f1b", "bp_zb_h1", "bp_zb_h2", build.DUALPIPEV)


@dataclass(frozen=True)
class DialCases:
    """Cases to time: every schedule for every K < P, streaming at K = P, and the rivals, for all M that they train."""

    stages: Sequence[int]
    layers: Sequence[int]
    micro_batches: Sequence[int]
    batches: int
    forward: float
    """Seconds that a stage sleeps in its forward pass."""
    backward: float
    """Seconds that a stage sleeps in its backward pass, half of them for its weights."""
    repeat: int

    def keys(self, stages: int) -> list[tuple[str, int]]:
        """Returns ``(schedule or method, K)`` on P stages."""
        groups = [(name, k) for k in self.layers if k < stages and stages % k == 0 for name in GROUP_SCHEDULES]
        return [*groups, ("streaming", stages), *((name, 1) for name in RIVALS)]

    def cases(self, stages: int) -> list[Key]:
        """Returns ``(schedule or method, K, M)`` on P stages."""
        return [
            (name, k, m)
            for m in self.micro_batches
            for name, k in self.keys(stages)
            if m >= workloads.least_micro_batches(name, stages)
        ]

    def total(self) -> int:
        """Returns the number of timed runs."""
        return self.repeat * sum(len(self.cases(stages)) for stages in self.stages)

    def ideal(self, name: str, *, stages: int, layers: int, micro_batches: int) -> float:
        """Returns the seconds of one case if only the sleeping layers took time."""
        common: dict[str, Any] = {"micro_batches": micro_batches, "batches": self.batches}
        if name not in GROUP_SCHEDULES:
            return ideal_seconds(name, stages=stages, forward=self.forward, backward=self.backward, **common)
        half = self.backward / 2
        size = stages // layers
        period = group_seconds(name, size=size, micro_batches=micro_batches, forward=self.forward, halves=(half, half))
        fill = group_fill(name, size=size, micro_batches=micro_batches, weights=half)
        return self.batches * period + (stages - size) * self.forward + fill

    def graphs(self, name: str, *, stages: int, layers: int, micro_batches: int) -> float:
        """Returns the graphs that a stage holds at the most, by formula."""
        if name not in GROUP_SCHEDULES:
            return held_graphs(name, stages=stages, micro_batches=micro_batches)
        return group_graphs(name, size=stages // layers, micro_batches=micro_batches)


def measure_dial(cases: DialCases, *, progress: Callable[[Row], None] | None = None) -> list[Row]:
    """Times all cases.

    Returns:
        Rows with ``method, schedule, stages, layers, micro_batches, batches, seconds`` (median), ``seconds_min,
        seconds_max, ideal, efficiency`` (ideal / seconds), ``graphs_held``, the largest number that was counted on a
        stage, and ``graphs_formula``.

    Raises:
        RankFailure: a rank failed.
    """
    rows = []
    for stages in cases.stages:

        def news(line: str, stages: int = stages) -> None:
            name, k, m, seconds = line.split()
            if progress is not None:
                progress(
                    {
                        "schedule": name,
                        "stages": stages,
                        "layers": int(k),
                        "micro_batches": int(m),
                        "seconds": float(seconds),
                    }
                )

        total = sum(cases.ideal(name, stages=stages, layers=k, micro_batches=m) for name, k, m in cases.cases(stages))
        by_rank = run_ranks(
            f"{__name__}:time_dial", stages, timeout=START_UP + 3 * cases.repeat * total, news=news, cases=cases
        )
        for name, k, m in by_rank[0]:
            spans = [[span for span, _ in rank[name, k, m]] for rank in by_rank]
            held = max(graphs for rank in by_rank for _, graphs in rank[name, k, m])
            seconds = [
                max(end for _, end in repetition) - min(start for start, _ in repetition)
                for repetition in zip(*spans, strict=True)
            ]
            median, ideal = statistics.median(seconds), cases.ideal(name, stages=stages, layers=k, micro_batches=m)
            group = name in GROUP_SCHEDULES
            rows.append(
                {
                    "method": "groups" if group else name,
                    "schedule": name if group else "",
                    "stages": stages,
                    "layers": k,
                    "micro_batches": m,
                    "batches": cases.batches,
                    "seconds": median,
                    "seconds_min": min(seconds),
                    "seconds_max": max(seconds),
                    "ideal": ideal,
                    "efficiency": ideal / median,
                    "graphs_held": held,
                    "graphs_formula": cases.graphs(name, stages=stages, layers=k, micro_batches=m),
                }
            )
    return rows


def time_dial(cases: DialCases) -> dict[Key, list[tuple[Span, float]]]:
    """Worker: returns start and end of every repetition on this rank, in seconds of the clock that all ranks share, and
    the most graphs that it held."""
    world = world_size()
    sleep: dict[str, Any] = {"forward": cases.forward, "backward": cases.backward}
    engines = {
        (name, k): workloads.dial_engine(name, stages=world, layers=k, **sleep)
        if name in GROUP_SCHEDULES
        else workloads.sleeping_engine(name, stages=world, **sleep)
        for name, k in cases.keys(world)
    }
    for (name, _), engine in engines.items():
        least = workloads.least_micro_batches(name, world)
        train(engine, workloads.micro_batches(engine), micro_batches=max(2, least), batches=1)
    spans: dict[Key, list[tuple[Span, float]]] = {key: [] for key in cases.cases(world)}
    for number in range(cases.repeat):
        for name, k, m in turns(list(spans), number):
            engine = engines[name, k]
            workloads.GRAPHS.take_peak()
            span = train(engine, workloads.micro_batches(engine), micro_batches=m, batches=cases.batches)
            parts = 2 if name == build.DUALPIPEV else 1
            spans[name, k, m].append((span, workloads.GRAPHS.take_peak() / parts))
            if dist.get_rank() == world - 1:
                tell(f"{name} {k} {m} {span[1] - span[0]}")
    return spans
