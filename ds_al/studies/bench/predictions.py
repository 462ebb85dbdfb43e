"""Compares predictions with measurements: the schedules, simulated with measured stage times, and wall clock times.

There are two kinds of rows. Files of run/profile.py contain the times of each stage's instructions; the prediction adds
the schedule. Files of sleeping layers only contain the nominal sleep of a layer; the additional time of a sleep and its
layer's few operations comes from the profile of *another* run, so the prediction uses nothing of the measured run.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_al.planner.formulas import ideal_seconds
from ds_al.planner.groups import group_sizes
from ds_al.planner.predict import BY_FORMULA
from ds_al.planner.simulator import StageCost, stage_ends
from ds_al.studies.results import Results, StudyError, read

Row = dict[str, Any]
_PARTS = ("forward", "backward", "step")
_KNOWN = ("method", "stages", "micro_batches", "batches", "seconds")


def against(files: Sequence[Path], *, profile: Path) -> list[Row]:
    """Rows ``source, workload, method, schedule, stages, layers, micro_batches, batches, times, measured, predicted,
    error``.

    ``times`` is the source of the stage times: ``"own"`` or ``"profile"``. ``error`` is predicted / measured - 1.

    Args:
        files: files of run/profile.py, run/bench.py --sleeping or --dial, and run/scaling.py --sleeping. Rows of
            networks without stage times are omitted.
        profile: profile of sleeping layers by run/profile.py, which provides the overheads for the other files.

    Raises:
        ValueError: a file is of another kind, or contains nothing that can be predicted.
    """
    overheads = _overheads(_read(profile))
    rows = [row for file in files for row in _rows(file, overheads)]
    if not rows:
        raise ValueError(f"got {', '.join(map(str, files))}: expected runs of sleeping layers, or of run/profile.py")
    return rows


def _read(path: Path) -> Results:
    try:
        results = read(path)
        if missing := [key for key in _KNOWN if key not in results.rows[0]]:
            raise StudyError(f"its rows have no {', '.join(missing)}")
    except StudyError as error:
        raise StudyError(f"{path} is no file of run/profile.py, run/bench.py or run/scaling.py: {error}") from error
    return results


def _overheads(profile: Results) -> dict[str, StageCost]:
    """Returns the time of a layer beyond its sleep, by method; means over all stages and micro-batches."""
    header, rows = profile.header, profile.rows
    settings, found = header["settings"], {}
    for method in dict.fromkeys(row["method"] for row in rows):
        forward, backward, step = (
            statistics.fmean(row[f"{part}_ms"] / 1000 for row in rows if row["method"] == method) for part in _PARTS
        )
        found[method] = StageCost(forward - settings["forward"], backward - settings["backward"], step)
    return found


def _rows(file: Path, overheads: Mapping[str, StageCost]) -> Iterator[Row]:
    results = _read(file)
    rows, settings, profiled = results.rows, results.header["settings"], results.kind == "profile"
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
            held = row["stages"] if results.kind == "dial" else layers  # a stage of a group sleeps as a layer does
            costs = _costs(row["method"], row["stages"], held, settings, overheads)
        predicted = _seconds(row, costs)
        yield {
            "source": file.name,
            "workload": row.get("workload", "sleeping"),
            "study": row.get("study", ""),
            "method": row["method"],
            "schedule": row.get("schedule", ""),
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
    """Returns the costs of sleeping stages; a data parallel replica holds all layers. A method that was not
    profiled has the overhead of 1F1B or streaming."""
    replicated = method == "bp_dp"
    beyond = overheads.get(method, overheads["bp_1f1b" if method.startswith("bp_") else "streaming"])
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
    size: dict[str, Any] = {"micro_batches": micro_batches, "batches": row["batches"]}
    if method in BY_FORMULA:
        one = costs[0]
        alone = ideal_seconds(method, stages=row["stages"], forward=one.forward, backward=one.backward, **size)
        return alone + row["batches"] * one.step
    groups = group_sizes(row["stages"], row["layers"]) if method == "groups" else ()
    ends = stage_ends(row["schedule"] if method == "groups" else method, costs, **size, groups=groups)
    return float(ends[:, -1, 0].max())


def work_of_profile(path: Path) -> dict[str, float]:
    """Returns times, rho and bytes of a network as fields of :class:`~ds_al.planner.Work`, from a run/profile.py file.

    Raises:
        StudyError: the file is of another kind, or lacks ``streaming`` or ``bp_1f1b``.
    """
    try:
        rows = read(path).rows
    except StudyError as error:
        raise StudyError(f"{path} is no file of run/profile.py: {error}") from error
    al, bp = (_most_micro_batches(rows, method, path) for method in ("streaming", "bp_1f1b"))
    forward, backward, step = (sum(row[f"{part}_ms"] for row in bp) / 1000 for part in _PARTS)
    local = sum(row["forward_ms"] + row["backward_ms"] for row in al) / 1000
    message = bp[0]["bytes_per_micro_batch"]
    return {
        "forward": forward,
        "backward": backward,
        "step": step,
        "rho": local / (forward + backward),
        "message_bytes": message,
        "target_bytes": max(al[0]["bytes_per_micro_batch"] - message, 0.0),
    }


def _most_micro_batches(rows: Sequence[Mapping[str, Any]], method: str, path: Path) -> list[Mapping[str, Any]]:
    own = [row for row in rows if row["method"] == method]
    if not own:
        raise StudyError(f"{path} has no {method}: profile it with --methods streaming,bp_1f1b")
    most = max(row["micro_batches"] for row in own)
    return [row for row in own if row["micro_batches"] == most]
