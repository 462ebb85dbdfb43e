"""Results files: a JSON file with kind, header and rows, and a CSV file of the rows next to it."""

from __future__ import annotations

import csv
import json
import os
import platform
import re
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_al.errors import ALError
from ds_al.system import provenance

Row = Mapping[str, Any]

_PACKAGES = ("ds_al", "torch", "deepspeed")
_ABSOLUTE = re.compile(r"(?:^|(?<==))/.*")
_TOLD_BY: Mapping[str, str] = {
    "budgets": "settled",
    "trials": "trials",
    "along": "share",
    "exits": "confidence",
    "seeds": "seed",
    "sweep": "test_accuracy",
    "perplexity": "perplexity",
    "perplexity_speed": "times_operations",
    "pretrained": "trained_share",
    "pretrained_speed": "held_bytes",
    "planner": "predicted",
    "traffic": "times_less",
    "slow_link": "rate_mbit",
    "frontier": "averaged_sd",
    "scaling": "study",
    "ceiling": "share_of_ceiling",
    "bound": "share_of_bound",
    "overhead": "cpu_us",
    "recipe_time": "twin_ms",
    "scale": "times_compute",
    "predictions": "bubble_least",
    "layers": "u",
    "profile": "step_ms",
    "tracing_cost": "ratio",
    "costs": "rho",
    "memory": "peak_bytes",
    "features": "feature",
    "dial": "graphs_held",
    "cores": "over_rival",
    "recovery": "recomputed",
    "repartition": "slowdown",
    "sleeping": "efficiency",
    "gpu": "part",
    "reliability": "promise",
}
"""A column by which to recognize each kind, tried in this order, for files of earlier versions that name no kind."""


class StudyError(ALError, ValueError):
    """Raised when a results file cannot be used."""


@dataclass(frozen=True)
class Results:
    """The content of a results file.

    Attributes:
        name: name of the file, without folder and suffix.
        kind: kind of the rows, one of :data:`KINDS`.
        header: date, command, machine, versions and settings.
        rows: rows with the same columns.
    """

    name: str
    kind: str
    header: Row
    rows: Sequence[Row]


KINDS = tuple(_TOLD_BY)


def header(*, runs: Iterable[Row] = (), **settings: Any) -> dict[str, Any]:
    """Returns date, command, machine, versions, and the settings of a measurement.

    Args:
        runs: runs that the measurement consists of: its date is that of the latest, since tables may be written long
            after it. Without a run that has a ``date`` it is now.
        settings: the settings.
    """
    return {
        "date": max((run["date"] for run in runs if "date" in run), default=now()),
        "command": _anywhere(provenance.command()),
        "machine": {"cores": os.cpu_count(), "cpu": provenance.cpu(), "system": platform.system()},
        "versions": {**{name: provenance.version(name) for name in _PACKAGES}, "python": platform.python_version()},
        "settings": settings,
    }


def _anywhere(command: str) -> str:
    """Returns the command that measures, as on any machine: an absolute path is of this one."""
    words = [word for word in shlex.split(command) if word != "--table-only"]
    return shlex.join(_ABSOLUTE.sub("PATH", word) for word in words)


def now() -> str:
    """Returns date and time as results have them, ``"2026-01-31 23:59:59"``."""
    return time.strftime("%Y-%m-%d %H:%M:%S")


def machine_and_versions(header: Row) -> str:
    """Returns date, machine and versions of a measurement as a line of text."""
    machine = header["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    return f"{header['date']}, {machine['cores']} cores ({machine['cpu']}), {versions}."


def origin(header: Row) -> str:
    """Returns the command of a measurement and :func:`machine_and_versions`."""
    return f"`{header['command']}`, {machine_and_versions(header)}"


def write(path: Path, *, kind: str, header: Row, rows: Sequence[Row], as_csv: bool = True) -> None:
    """Writes ``{"kind": ..., "header": ..., "rows": [...]}`` to a JSON file.

    Args:
        path: the JSON file.
        kind: kind of the rows, one of :data:`KINDS`.
        header: see :func:`header`.
        rows: rows with the same columns.
        as_csv: whether to also write a CSV file of the same name; not for rows that contain mappings.
    """
    if kind not in KINDS:
        raise StudyError(f"kind of results: got {kind!r}, expected one of {', '.join(KINDS)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"kind": kind, "header": header, "rows": rows}, indent=1) + "\n")
    if not as_csv:
        return
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> Results:
    """Reads a results file.

    Raises:
        StudyError: the file is missing or no results file, or its kind is unknown.
    """
    try:
        content = json.loads(path.read_text())
        rows, header = content["rows"], content["header"]
        if not isinstance(rows, list) or not isinstance(header, dict):
            raise ValueError("expected an object with a header and rows")
        return Results(path.stem, content.get("kind") or kind_of(rows), header, rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StudyError(f"{path} is no measurement: {error}") from error


def kind_of(rows: Sequence[Row]) -> str:
    """Infers the kind of rows from their columns.

    Raises:
        StudyError: no kind matches.
    """
    for kind, column in _TOLD_BY.items():
        if rows and column in rows[0]:
            return kind
    raise StudyError(f"got rows with {', '.join(rows[0]) if rows else 'nothing'}: expected one of {', '.join(KINDS)}")
