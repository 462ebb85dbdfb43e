"""Markdown tables of the scaling studies, of the ceiling of two cores, and of the ratio to 1F1B."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ds_al.studies.bench import published

Row = Mapping[str, Any]


def scaling_tables(rows: Sequence[Row]) -> str:
    """A table per study: speed-up and efficiency of each method over stages, the published speed-up below.

    A number that was computed from busy times stands in italics, and what it is made of in a table of its own.
    """
    parts = []
    for study in dict.fromkeys(row["study"] for row in rows):
        own = [row for row in rows if row["study"] == study]
        counts = sorted({row["stages"] for row in own})
        layers = "k layers on k stages" if study == "weak" else f"{own[0]['layers']} layers"
        settings = f"M = {own[0]['micro_batches']}, runs of each case: {own[0]['repeats']}"
        lines = [
            f"**{study.capitalize()} scaling**, {_workload(own[0])}, {layers}, {settings}: speed-up over one stage, "
            "in brackets the efficiency",
            "",
            f"| method | {' | '.join(map(str, counts))} |",
            f"|---|{'---:|' * len(counts)}",
        ]
        for method in dict.fromkeys(row["method"] for row in own):
            cells = {row["stages"]: _speedup(row) for row in own if row["method"] == method}
            lines.append(f"| `{method}` | {' | '.join(cells.get(count, '') for count in counts)} |")
        for method in ("AL", "BP"):
            curve = published.speedups(study, method)
            cells = {count: f"{curve[count]:.2f}" for count in counts if count in curve}
            lines.append(f"| published {method} | {' | '.join(cells.get(count, '') for count in counts)} |")
        parts.append("\n".join(lines))
    notes = [
        "Efficiency: the ideal time, in which nothing but equal stages takes time, over the time. "
        f"Published: {published.SOURCE}."
    ]
    if any(row["basis"] == "computed" for row in rows):
        notes.append(
            "*Italics*: computed. There were more stages than cores, so the wall clock says nothing; the time is what "
            "the schedule takes with the processor time that each stage was measured to need, engine included."
        )
        parts.append(busy_table(rows))
    return "\n\n".join([*parts, " ".join(notes)]) + "\n"


def busy_table(rows: Sequence[Row]) -> str:
    """What the computed numbers are made of: busy time of the slowest stage, of all, and wall-clock time."""
    lines = [
        "| study | method | stages | layers | busy, slowest stage | all stages | engine, ms per micro-batch "
        "| attainable | wall clock |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['study']} | `{row['method']}` | {row['stages']} | {row['layers']} | {row['busy_seconds']:.2f} s "
            f"| {sum(row['busy_by_stage']):.2f} s | {row['engine_ms']:.2f} | {row['attainable_seconds']:.2f} s "
            f"| {row['seconds']:.2f} s |"
        )
    return "\n".join(lines)


def ceiling_table(rows: Sequence[Row]) -> str:
    """Samples per second of streaming beside those of the same stages alone."""
    lines = [
        "| network | samples per second | quartiles | stages alone | quartiles | share of the ceiling | quartiles "
        "| balance of stages | runs |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        own = {row["method"]: row for row in rows if row["model"] == model}
        cells = []
        for method in ("streaming", "ceiling"):
            row = own[method]
            cells += [
                f"{row['samples_per_s']:.1f}",
                f"{row['samples_per_s_low']:.1f} to {row['samples_per_s_high']:.1f}",
            ]
        row = own["streaming"]
        cells += [f"**{row['share_of_ceiling']:.3f}**", f"{row['share_low']:.3f} to {row['share_high']:.3f}"]
        cells += [f"{row['balance']:.3f}", str(row["repeats"])]
        name = f"`{model}`, {row['stages']} stages cut at {_cuts(row['cuts'])}, micro-batches of {row['micro_batch']}"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def ratio_table(rows: Sequence[Row]) -> str:
    """Streaming over 1F1B beside its bounds, for every M; where it loses is said in words."""
    lines = [
        "| network | M | streaming / 1F1B | quartiles | faster | bound | share of it | bound, stages as they are "
        "| share of it | rho, time | rho, FLOPs |",
        "|---|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| `{row['model']}` | {row['micro_batches']} | **{row['ratio']:.3f}** "
            f"| {row['ratio_low']:.3f} to {row['ratio_high']:.3f} "
            f"| {'streaming' if row['wins'] else '**1F1B: AL loses here**'} "
            f"| {row['bound']:.3f} | {row['share_of_bound']:.3f} | {row['bound_balanced']:.3f} "
            f"| {row['share_of_balanced']:.3f} | {row['rho']:.3f} | {row['rho_by_flops']:.3f} |"
        )
    for model in dict.fromkeys(row["model"] for row in rows):
        row = next(row for row in rows if row["model"] == model)
        lines += [
            "",
            f"`{model}`: AL cut at {_cuts(row['al_cuts'])}, balance {row['al_balance']:.3f}; twin cut at "
            f"{_cuts(row['twin_cuts'])}, balance {row['twin_balance']:.3f} (mean over slowest stage); "
            f"micro-batches of {row['micro_batch']}, {row['repeats']} repetitions.",
        ]
    return "\n".join(lines) + "\n"


def _speedup(row: Row) -> str:
    speedup = "-" if row["speedup"] is None else f"{row['speedup']:.2f}"
    cell = f"{speedup} ({row['efficiency']:.3f})"
    return cell if row["basis"] == "measured" else f"*{cell}*"


def _workload(row: Row) -> str:
    return "layers that sleep" if row["workload"] == "sleeping" else f"{row['workload'].capitalize()} on {row['data']}"


def _cuts(cuts: Sequence[int]) -> str:
    return ", ".join(map(str, cuts[1:-1]))
