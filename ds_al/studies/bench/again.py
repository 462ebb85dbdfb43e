"""Repeats the short cases of a results file with its settings, for ``run/bench.py --check``."""

from __future__ import annotations

from dataclasses import replace

from ds_al.figures.terminal import Console
from ds_al.studies.bench.cases import Row, SleepingCases, measure_sleeping
from ds_al.studies.bench.guard import GuardError
from ds_al.studies.bench.overhead import measure_overhead
from ds_al.studies.progress import Bar
from ds_al.studies.results import Results


def time_sleeping(cases: SleepingCases, console: Console) -> list[Row]:
    """Times sleeping layers and shows a progress bar."""
    total = sum(cases.total_seconds(stages=stages) for stages in cases.stages)
    console.print(f"at least {total:.0f} s of sleep", highlight=False)
    with Bar(console, total) as bar:

        def progress(case: Row) -> None:
            size = f"{case['stages']} stages, {case['micro_batches']} micro-batches, {case['method']}"
            bar.advance(case["ideal"], f"{size}: {case['seconds']:.3f} s")

        return measure_sleeping(cases, progress=progress)


def measure_again(baseline: Results, *, repeat: int, console: Console) -> Results:
    """Measures the baseline's short cases again.

    Raises:
        GuardError: cases of this kind take too long, or need more than this machine.
        RankFailure: a rank failed.
    """
    rows, settings = baseline.rows, baseline.header.get("settings", {})
    if baseline.kind == "overhead":
        found = measure_overhead(
            methods=tuple(dict.fromkeys(row["method"] for row in rows)),
            stages=rows[0]["stages"],
            micro_batches=rows[0]["micro_batches"],
            batches=rows[0]["batches"],
        )
    elif baseline.kind == "sleeping":
        numbers = sorted({row["micro_batches"] for row in rows})
        cases = SleepingCases(
            methods=("streaming", "bp_1f1b"),
            stages=tuple(sorted({row["stages"] for row in rows} & {2, 4})),
            micro_batches=(numbers[len(numbers) // 2],),
            batches=settings["batches"],
            forward=settings["forward"],
            backward=settings["backward"],
            repeat=repeat,
        )
        found = time_sleeping(cases, console)
    else:
        raise GuardError(
            f"{baseline.name} is of kind {baseline.kind!r}: measure it anew by its command, and give --current"
        )
    return replace(baseline, header={}, rows=found)
