"""Predictions beside what was measured: the schedules run on stages of measured times, against the wall clock.

Two kinds of row. Files of run/profile.py know how long each stage's instructions took: the prediction adds the
schedule. Files of sleeping layers alone know only how long a layer was to sleep: what a sleep, with its layer's few
operations, takes beyond that is taken from the profile of *another* run, so nothing of the measured run is used.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_al.planner.simulator import StageCost, stage_ends

Row = dict[str, Any]
_PARTS = ("forward", "backward", "step")
_KNOWN = ("method", "stages", "micro_batches", "batches", "seconds")


def against(files: Sequence[Path], *, profile: Path) -> list[Row]:
    """Rows ``source, workload, method, stages, layers, micro_batches, batches, times, measured, predicted, error``.

    ``times`` says whose: ``"own"``, or ``"profile"``. ``error`` is predicted over measured, less 1.

    Args:
        files: of run/profile.py, of run/bench.py --sleeping, and of run/scaling.py --sleeping. Rows of networks
            without stage times are left out.
        profile: of sleeping layers, by run/profile.py: whose overheads are used for the others.

    Raises:
        ValueError: a file is none of these, or nothing in them can be predicted.
    """
    overheads = _overheads(*_read(profile))
    rows = [row for file in files for row in _rows(file, overheads)]
    if not rows:
        raise ValueError(f"got {', '.join(map(str, files))}: expected runs of sleeping layers, or of run/profile.py")
    return rows


def _read(path: Path) -> tuple[Mapping[str, Any], list[Row]]:
    try:
        content = json.loads(path.read_text())
        header, rows = content["header"], content["rows"]
        if missing := [key for key in _KNOWN if key not in rows[0]]:
            raise ValueError(f"its rows have no {', '.join(missing)}")
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path} is no file of run/profile.py, run/bench.py or run/scaling.py: {error}") from error
    return header, rows


def _overheads(header: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, StageCost]:
    """What a layer takes beyond its sleep, by method; means over all stages and micro-batches."""
    settings, found = header["settings"], {}
    for method in dict.fromkeys(row["method"] for row in rows):
        forward, backward, step = (
            statistics.fmean(row[f"{part}_ms"] / 1000 for row in rows if row["method"] == method) for part in _PARTS
        )
        found[method] = StageCost(forward - settings["forward"], backward - settings["backward"], step)
    return found


def _rows(file: Path, overheads: Mapping[str, StageCost]) -> Iterator[Row]:
    header, rows = _read(file)
    settings = header["settings"]
    profiled = "stage" in rows[0]
    for row in rows:
        layers = int(row["layers"] if "layers" in row else row["stages"])
        if profiled:
            if row["stage"]:
                continue
            key = {name: row[name] for name in ("workload", "method", "stages", "micro_batches")}
            own = [each for each in rows if all(each[name] == value for name, value in key.items())]
            costs = [StageCost(*(each[f"{part}_ms"] / 1000 for part in _PARTS)) for each in own]
        else:
            if row.get("workload", "sleeping") != "sleeping" or not {"forward", "backward"} <= settings.keys():
                continue
            costs = _costs(row["method"], row["stages"], layers, settings, overheads)
        predicted = _seconds(row, costs)
        yield {
            "source": file.name,
            "workload": row.get("workload", "sleeping"),
            "study": row.get("study", ""),
            "method": row["method"],
            "stages": row["stages"],
            "layers": layers,
            "micro_batches": row["micro_batches"],
            "batches": row["batches"],
            "times": "own" if profiled else "profile",
            "measured": row["seconds"],
            "predicted": predicted,
            "error": predicted / row["seconds"] - 1,
        }


def _costs(
    method: str, stages: int, layers: int, settings: Mapping[str, Any], overheads: Mapping[str, StageCost]
) -> list[StageCost]:
    """Of stages that sleep; a data parallel replica sleeps for all layers, by DeepSpeed's engine like 1F1B."""
    replicated = method == "bp_dp"
    beyond = overheads["bp_1f1b" if replicated else method]
    held = layers if replicated else layers / stages
    return [
        StageCost(
            held * (settings["forward"] + beyond.forward),
            held * (settings["backward"] + beyond.backward),
            held * beyond.step,
        )
    ] * stages


def _seconds(row: Mapping[str, Any], costs: list[StageCost]) -> float:
    method, micro_batches = row["method"], row["micro_batches"]
    if method == "bp_dp":
        method, micro_batches, costs = "bp_1f1b", -(-micro_batches // row["stages"]), costs[:1]
    return float(stage_ends(method, costs, micro_batches=micro_batches, batches=row["batches"])[:, -1, 0].max())


def against_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table per file: seconds measured, and in brackets by how much the prediction is off."""
    parts = []
    for source, workload, study in dict.fromkeys((r["source"], r["workload"], r["study"]) for r in rows):
        own = [r for r in rows if (r["source"], r["workload"], r["study"]) == (source, workload, study)]
        columns = list(dict.fromkeys((r["stages"], r["layers"], r["micro_batches"]) for r in own))
        heads = [f"P = {p}, {'' if layers == p else f'{layers} layers, '}M = {m}" for p, layers, m in columns]
        whose = "stage times of the same run" if own[0]["times"] == "own" else "overheads of another run"
        lines = [
            f"`{source}`, {workload}{f', {study} scaling' if study else ''}, {whose}:",
            "",
            f"| method | {' | '.join(heads)} |",
            f"|---|{'---:|' * len(heads)}",
        ]
        for method in dict.fromkeys(r["method"] for r in own):
            cells = {
                (r["stages"], r["layers"], r["micro_batches"]): f"{r['measured']:.2f} s ({100 * r['error']:+.1f} %)"
                for r in own
                if r["method"] == method
            }
            lines.append(f"| `{method}` | {' | '.join(cells.get(column, '') for column in columns)} |")
        parts.append("\n".join(lines))
    errors = sorted(abs(r["error"]) for r in rows)
    within = sum(error <= 0.05 for error in errors)
    parts.append(
        f"{within} of {len(rows)} configurations within 5 %; median of the error {statistics.median(errors):.1%}, "
        f"largest {errors[-1]:.1%}."
    )
    return "\n\n".join(parts) + "\n"
