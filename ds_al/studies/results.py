"""Files of results: a JSON file with a header, rows and their kind, and the rows as CSV beside it."""

from __future__ import annotations

import csv
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_al.errors import ALError
from ds_al.system import provenance

Row = Mapping[str, Any]

_PACKAGES = ("ds_al", "torch", "deepspeed")
_TOLD_BY: Mapping[str, str] = {
    "trials": "trials",
    "exits": "confidence",
    "seeds": "seed",
    "sweep": "test_accuracy",
    "perplexity": "perplexity",
    "planner": "predicted",
    "traffic": "times_less",
    "slow_link": "rate_mbit",
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
    "sleeping": "efficiency",
}
"""By kind a column that its rows have, and rows of no later kind: for files of earlier versions, which name none."""


class StudyError(ALError, ValueError):
    """A file of results cannot be used."""


@dataclass(frozen=True)
class Results:
    """The content of a file of results.

    Attributes:
        name: of the file, without folder and suffix.
        kind: what the rows are, one of :data:`KINDS`.
        header: date, command, machine, versions and settings.
        rows: all with the same columns.
    """

    name: str
    kind: str
    header: Row
    rows: Sequence[Row]


KINDS = tuple(_TOLD_BY)


def header(**settings: Any) -> dict[str, Any]:
    """Date, command, machine, versions, and the settings of a measurement."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": provenance.command(),
        "machine": {"cores": os.cpu_count(), "cpu": provenance.cpu(), "system": platform.system()},
        "versions": {**{name: provenance.version(name) for name in _PACKAGES}, "python": platform.python_version()},
        "settings": settings,
    }


def machine_and_versions(header: Row) -> str:
    """When, where and with what a measurement was taken, as a line of text."""
    machine = header["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    return f"{header['date']}, {machine['cores']} cores ({machine['cpu']}), {versions}."


def origin(header: Row) -> str:
    """The command of a measurement, and :func:`machine_and_versions`."""
    return f"`{header['command']}`, {machine_and_versions(header)}"


def write(path: Path, *, kind: str, header: Row, rows: Sequence[Row], as_csv: bool = True) -> None:
    """Writes ``{"kind": ..., "header": ..., "rows": [...]}`` to a JSON file.

    Args:
        kind: what the rows are, one of :data:`KINDS`.
        as_csv: also writes the rows to a CSV file of the same name; not for rows that hold mappings.
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
    """Reads a file of results.

    Raises:
        StudyError: the file is missing, is not one of results, or its kind is unknown.
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
    """The kind of rows that do not name it, by their columns.

    Raises:
        StudyError: they are of none.
    """
    for kind, column in _TOLD_BY.items():
        if rows and column in rows[0]:
            return kind
    raise StudyError(f"got rows with {', '.join(rows[0]) if rows else 'nothing'}: expected one of {', '.join(KINDS)}")
