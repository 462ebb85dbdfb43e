"""Declares the tables of scaling, of the ceiling, of the ratio to 1F1B, and of predictions and measurements."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ds_al.figures.parts import Table
from ds_al.studies.bench import published
from ds_al.studies.results import Row
from ds_al.studies.tables.write import Column, crossed, groups, listed, more, number

METHOD = Column("method", "`{method}`", left=True)

SCALING = (
    Column("study", "{study}", left=True),
    METHOD,
    Column("P", "{stages}"),
    Column("seconds", "{seconds:.2f}"),
    Column("busy", "{busy_seconds:.2f}"),
    Column("ideal", "{ideal:.2f}"),
    Column("computed", "{attainable_seconds:.2f}"),
    Column("efficiency", "{efficiency:.3f}"),
    Column("speed-up", number("speedup", ".2f")),
    Column("by", "{basis}", left=True),
)
BUSY = (
    Column("study", "{study}", left=True),
    METHOD,
    Column("stages", "{stages}"),
    Column("layers", "{layers}"),
    Column("busy, slowest stage", "{busy_seconds:.2f} s"),
    Column("all stages", lambda row: f"{sum(row['busy_by_stage']):.2f} s"),
    Column("engine, ms per micro-batch", "{engine_ms:.2f}"),
    Column("attainable", "{attainable_seconds:.2f} s"),
    Column("wall clock", "{seconds:.2f} s"),
)
BOUND = (
    Column("network", "`{model}`", left=True),
    Column("M", "{micro_batches}"),
    Column("streaming / 1F1B", "**{ratio:.3f}**"),
    Column("quartiles", "{ratio_low:.3f} to {ratio_high:.3f}"),
    Column("faster", lambda row: "streaming" if row["wins"] else "**1F1B: AL loses here**", left=True),
    Column("bound", "{bound:.3f}"),
    Column("share of it", "{share_of_bound:.3f}"),
    Column("bound, stages as they are", "{bound_balanced:.3f}"),
    Column("share of it", "{share_of_balanced:.3f}"),
    Column("rho, time", "{rho:.3f}"),
    Column("rho, FLOPs", "{rho_by_flops:.3f}"),
)


def scaling(rows: Sequence[Row]) -> list[Table | str]:
    """Returns a table per study: speed-up and efficiency of each method over stages, and the published speed-up.

    Numbers computed from busy times are in italics; a separate table lists those times.
    """
    blocks: list[Table | str] = []
    for own in groups(rows, "study"):
        first, study = own[0], own[0]["study"]
        layers = "k layers on k stages" if study == "weak" else f"{first['layers']} layers"
        table = crossed(own, [METHOD], [Column("{stages}", _speedup)], by="stages")
        curves = {method: published.speedups(study, method) for method in ("AL", "BP")}
        known = [
            [f"published {method}", *(f"{curve[int(p)]:.2f}" if int(p) in curve else "" for p in table.columns[1:])]
            for method, curve in curves.items()
        ]
        blocks += [
            f"**{study.capitalize()} scaling**, {_workload(first)}, {layers}, M = {first['micro_batches']}, runs of "
            f"each case: {first['repeats']}: speed-up over one stage, in brackets the efficiency",
            more(table, known),
        ]
    notes = (
        "Efficiency: the ideal time, in which nothing but equal stages takes time, over the time. "
        f"Published: {published.SOURCE}."
    )
    if any(row["basis"] == "computed" for row in rows):
        blocks.append(listed(rows, BUSY))
        notes += (
            " *Italics*: computed. There were more stages than cores, so the wall clock says nothing; the time is what "
            "the schedule takes with the processor time that each stage was measured to need, engine included."
        )
    return [*blocks, notes]


def scaling_listed(rows: Sequence[Row]) -> list[Table | str]:
    """Returns one line per case, for the terminal."""
    return [
        listed(rows, SCALING, caption="scaling; seconds of all batches"),
        "busy: the slowest stage; computed: the schedule with busy times; by: what efficiency and speed-up are of",
    ]


def ceiling(rows: Sequence[Row]) -> list[Table | str]:
    """Returns the samples per second of streaming and of the same stages alone."""
    pairs = [{row["method"]: row for row in own} for own in groups(rows, "model")]
    merged = [{**pair["streaming"], **{f"alone_{name}": pair["ceiling"][name] for name in _SPEED}} for pair in pairs]
    columns = (
        Column("network", _network, left=True),
        Column("samples per second", "{samples_per_s:.1f}"),
        Column("quartiles", "{samples_per_s_low:.1f} to {samples_per_s_high:.1f}"),
        Column("stages alone", "{alone_samples_per_s:.1f}"),
        Column("quartiles", "{alone_samples_per_s_low:.1f} to {alone_samples_per_s_high:.1f}"),
        Column("share of the ceiling", "**{share_of_ceiling:.3f}**"),
        Column("quartiles", "{share_low:.3f} to {share_high:.3f}"),
        Column("balance of stages", "{balance:.3f}"),
        Column("runs", "{repeats}"),
    )
    return [listed(merged, columns)]


def bound(rows: Sequence[Row]) -> list[Table | str]:
    """Returns the speed of streaming over 1F1B and its bounds, for every M; losses are marked in words."""
    notes = [
        f"`{row['model']}`: AL cut at {_cuts(row['al_cuts'])}, balance {row['al_balance']:.3f}; twin cut at "
        f"{_cuts(row['twin_cuts'])}, balance {row['twin_balance']:.3f} (mean over slowest stage); "
        f"micro-batches of {row['micro_batch']}, {row['repeats']} repetitions."
        for row, *_ in groups(rows, "model")
    ]
    return [listed(rows, BOUND), *notes]


def planner(rows: Sequence[Row]) -> list[Table | str]:
    """Returns a table per file: measured seconds, with the error of the prediction in brackets."""
    blocks: list[Table | str] = []
    for own in groups(rows, "source", "workload", "study"):
        first = own[0]
        whose = "stage times of the same run" if first["times"] == "own" else "overheads of another run"
        study = f", {first['study']} scaling" if first["study"] else ""
        blocks += [
            f"`{first['source']}`, {first['workload']}{study}, {whose}:",
            crossed(
                [{**row, "method": row.get("schedule") or row["method"], "size": _size(row)} for row in own],
                [METHOD],
                [Column("{size}", "{measured:.2f} s ({error*100:+.1f} %)")],
            ),
        ]
    errors = sorted(abs(row["error"]) for row in rows)
    within = sum(error <= 0.05 for error in errors)
    return [
        *blocks,
        f"{within} of {len(rows)} configurations within 5 %; median of the error {statistics.median(errors):.1%}, "
        f"largest {errors[-1]:.1%}.",
    ]


_SPEED = ("samples_per_s", "samples_per_s_low", "samples_per_s_high")


def _size(row: Row) -> str:
    layers = "" if row["layers"] == row["stages"] else f"{row['layers']} layers, "
    return f"P = {row['stages']}, {layers}M = {row['micro_batches']}"


def _speedup(row: Row) -> str:
    speedup = "-" if row["speedup"] is None else f"{row['speedup']:.2f}"
    cell = f"{speedup} ({row['efficiency']:.3f})"
    return cell if row["basis"] == "measured" else f"*{cell}*"


def _workload(row: Row) -> str:
    return "layers that sleep" if row["workload"] == "sleeping" else f"{row['workload'].capitalize()} on {row['data']}"


def _network(row: Row) -> str:
    stages = f"{row['stages']} stages cut at {_cuts(row['cuts'])}"
    return f"`{row['model']}`, {stages}, micro-batches of {row['micro_batch']}"


def _cuts(cuts: Sequence[int]) -> str:
    return ", ".join(map(str, cuts[1:-1]))
