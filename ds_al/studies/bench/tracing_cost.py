"""Measures the slow-down of a batch by tracing: traced and untraced batches alternate in one run."""

from __future__ import annotations

import statistics
import time
from typing import Any

from ds_al.launch.ranks import run_ranks
from ds_al.studies.bench.cases import START_UP, Row, train, world_size
from ds_al.studies.bench.profile import ProfileCases
from ds_al.trace import Recorder


def measure_tracing_cost(cases: ProfileCases) -> list[Row]:
    """Times ``repeat`` pairs of ``batches`` batches, without and with a recorder, for every case.

    Returns:
        Rows ``workload, method, stages, micro_batches, pairs, seconds_without`` (median, of one batch), ``ratio``
        (median over the pairs, traced / untraced), ``ratio_low, ratio_high`` (its quartiles).

    Raises:
        RankFailure: a rank failed.
    """
    by_rank = run_ranks(f"{__name__}:time_pairs", cases.stages, timeout=10 * START_UP, cases=cases)
    rows = []
    for method, m in by_rank[0]:
        # The slowest stage determines the time of a pair.
        pairs = [
            [max(times) for times in zip(*pair, strict=True)]
            for pair in zip(*(r[method, m] for r in by_rank), strict=True)
        ]
        ratios = sorted(traced / untraced for untraced, traced in pairs)
        low, ratio, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        rows.append(
            {
                "workload": cases.model or "sleeping",
                "method": method,
                "stages": cases.stages,
                "micro_batches": m,
                "pairs": len(ratios),
                "seconds_without": statistics.median(untraced for untraced, _ in pairs) / cases.batches,
                "ratio": ratio,
                "ratio_low": low,
                "ratio_high": high,
            }
        )
    return rows


def time_pairs(cases: ProfileCases) -> dict[tuple[str, int], list[tuple[float, float]]]:
    """Runs on each rank: returns the seconds without and with a recorder, of every case and repetition."""
    world_size()
    seconds: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for method in cases.methods:
        engine = cases.engine(method)
        data = cases.data(engine)
        for m in cases.micro_batches:
            train(engine, data, micro_batches=m, batches=2)
            seconds[method, m] = [_pair(engine, data, m, cases, traced_first=n % 2 == 1) for n in range(cases.repeat)]
    return seconds


def _pair(
    engine: Any, data: Any, micro_batches: int, cases: ProfileCases, *, traced_first: bool
) -> tuple[float, float]:
    times = {}
    for traced in (traced_first, not traced_first):
        engine.recording.recorder = Recorder(engine.stage_id, device=engine.device) if traced else None
        start, _ = train(engine, data, micro_batches=micro_batches, batches=cases.batches)
        times[traced] = time.perf_counter() - start
        engine.recording.recorder = None
    return times[False], times[True]
