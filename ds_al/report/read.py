"""Reads run folders (see :mod:`ds_al.experiment.run_folder`) of any version, and profile files."""

from __future__ import annotations

import csv
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_al.config.methods import EMULATED
from ds_al.errors import ALReportError
from ds_al.system.secrets import without_secrets

_OBJECTS = ("associated_learning", "experiment", "resolved", "versions")
"""Keys that hold objects."""
_TRACE_COLUMNS = ("stage", "instruction", "start", "end")


@dataclass(frozen=True)
class TraceEvent:
    """One instruction on one stage, or the part of it that one layer executed.

    Attributes:
        stage: index of the stage, from 0.
        instruction: DeepSpeed's class name, such as ``ForwardPass``.
        micro_batch: index of the micro-batch, or ``None``.
        layer: index of the layer, or ``None`` for the instruction of the whole stage.
        start: seconds since the first event of the trace.
        end: seconds since the first event of the trace.
        wait: seconds of the event spent waiting.
        nbytes: bytes sent or received, or ``None``.
        memory: peak bytes held for backward during the event, or ``None``.
        copy: index of the data parallel replica of the pipeline.
    """

    stage: int
    instruction: str
    micro_batch: int | None
    layer: int | None
    start: float
    end: float
    wait: float
    nbytes: int | None
    memory: int | None
    copy: int = 0


@dataclass(frozen=True)
class Profile:
    """A profile file: a header (date, command, machine) and a row per method and stage."""

    path: Path
    header: dict[str, Any]
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class RunRecord:
    """Content of a run folder. Data that the run's version did not write are ``None`` or empty.

    Attributes:
        folder: the run folder.
        config: the whole config, without resolved values.
        facts: resolved values, overridden by the summary.
        epochs: one row per epoch, in order.
        batches: one row per batch, in order; associated learning only.
        trace: events, ordered by start.
        finished: whether the run wrote its summary.
        notes: sentences on data that could not be read.
    """

    folder: Path
    config: dict[str, Any]
    facts: dict[str, Any]
    epochs: list[dict[str, Any]]
    batches: list[dict[str, Any]]
    trace: list[TraceEvent]
    finished: bool
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of the run, ``<name>/<time>`` as in the folder's path."""
        return "/".join(self.folder.parts[-2:])

    @property
    def method(self) -> str:
        """The schedule, such as ``streaming``."""
        block = self.config.get("associated_learning") or {}
        return str(self.facts.get("method") or block.get("method") or "method not recorded")

    @property
    def is_emulated(self) -> bool:
        """Whether the run has the accuracy of its method, but not its times."""
        return self.method in EMULATED

    @property
    def model(self) -> dict[str, Any]:
        """Name (``name``) and options of the network."""
        return _block(self, "model")

    @property
    def data(self) -> dict[str, Any]:
        """Name (``name``) and preparation of the data."""
        return _block(self, "data")

    @property
    def layers(self) -> int | None:
        """Number of layers."""
        partition = self.facts.get("partition") or [None]
        return whole(self.facts.get("layers")) or whole(partition[-1])

    @property
    def planned_epochs(self) -> int | None:
        """Configured number of epochs."""
        return whole(self.facts.get("epochs")) or whole((self.config.get("experiment") or {}).get("epochs"))

    @property
    def seed(self) -> int | None:
        """Seed of weights and data order."""
        seed = whole(self.facts.get("seed"))
        return whole((self.config.get("experiment") or {}).get("seed")) if seed is None else seed

    @property
    def test_accuracy(self) -> list[float]:
        """Test accuracy of each exit after the last epoch; empty if not recorded."""
        return numbers(self.facts.get("test_accuracy"))

    @property
    def training_seconds(self) -> float | None:
        """Seconds of training, without evaluation; ``None`` where the method is emulated."""
        if self.is_emulated:
            return None
        known = number(self.facts.get("training_seconds"))
        seconds = [number(row.get("seconds")) or 0.0 for row in self.epochs]
        return known if known is not None or not seconds else sum(seconds)

    @property
    def command(self) -> str | None:
        """Command line of the run."""
        command = self.facts.get("command")
        return shlex.join(map(str, command)) if isinstance(command, (list, tuple)) else command and str(command)

    def value(self, key: str) -> Any:
        """Returns a fact by its key, or ``None``."""
        return self.facts.get(key)

    def stage_values(self, key: str) -> list[float | None]:
        """Returns a fact with a number per stage, such as ``idle``; empty if not recorded."""
        values = self.facts.get(key)
        return [number(value) for value in values] if isinstance(values, (list, tuple)) else []

    def validation(self) -> list[tuple[int, float, float]]:
        """Returns epochs, seconds of training until then, and validation accuracies of the last exit."""
        rows, seconds = [], 0.0
        for row in self.epochs:
            seconds += number(row.get("seconds")) or 0.0
            accuracy = numbers(row.get("validation_accuracy"))
            if accuracy:
                rows.append((int(row["epoch"]), seconds, accuracy[-1]))
        return rows


def read(paths: Sequence[str | Path]) -> tuple[list[RunRecord], list[Profile]]:
    """Reads run folders, folders of run folders at any depth, and profile files.

    Args:
        paths: folders, or ``.json`` files with ``header`` and ``rows``.

    Returns:
        The distinct runs in the order of the paths, and the profiles.

    Raises:
        ALReportError: a path is missing, holds no run, or a file in it is damaged.
    """
    folders: dict[Path, None] = {}
    profiles = []
    for path in map(Path, paths):
        if path.is_file() and path.suffix == ".json":
            profiles.append(read_profile(path))
            continue
        if not path.is_dir():
            what = "is a file" if path.exists() else "does not exist"
            raise ALReportError(f"{path} {what}: expected a run folder, a folder of them, or a profile's .json file")
        found = [path] if is_run(path) else sorted({file.parent for file in path.rglob("config.json")})
        found = [folder for folder in found if is_run(folder)]
        if not found:
            raise ALReportError(
                f"{path} is not a run and holds none: expected config.json and metrics.jsonl, as run/train.py "
                "writes them to runs/<name>/<time>/"
            )
        folders |= dict.fromkeys(folder.resolve() for folder in found)
    if not folders and not profiles:
        raise ALReportError("got no runs: give folders such as runs/<name>/<time>, or a folder of them")
    return [read_run(folder) for folder in folders], profiles


def is_run(folder: Path) -> bool:
    """Returns whether a folder is that of a run, finished or not."""
    return (folder / "config.json").is_file() and any(
        (folder / name).is_file() for name in ("metrics.jsonl", "summary.json")
    )


def read_run(folder: str | Path) -> RunRecord:
    """Reads one run folder.

    Raises:
        ALReportError: the folder is not a run, or a file in it is damaged.
    """
    folder = Path(folder)
    if not is_run(folder):
        raise ALReportError(f"{folder} is not a run: expected config.json and metrics.jsonl in it")
    notes: list[str] = []
    config = _sound(without_secrets(_json(folder / "config.json")), "config.json", notes)
    resolved = _sound(config.pop("resolved", None) or {}, "config.json", notes)
    finished = (folder / "summary.json").is_file()
    summary = _sound(_json(folder / "summary.json"), "summary.json", notes) if finished else {}
    rows = _lines(folder / "metrics.jsonl", notes)
    epochs = [row for row in rows if row.get("kind") == "epoch" and whole(row.get("epoch")) is not None]
    return RunRecord(
        folder=folder,
        config=config,
        facts={**resolved, **without_secrets(summary)},
        epochs=sorted(epochs, key=lambda row: row["epoch"]),
        batches=[row for row in rows if row.get("kind") == "batch" and _is_losses(row.get("losses"))],
        trace=_trace(folder / "trace" / "trace.csv", notes),
        finished=finished,
        notes=notes,
    )


def read_profile(path: Path) -> Profile:
    """Reads a file of ``run/profile.py``.

    Raises:
        ALReportError: the file is damaged or holds no rows.
    """
    content = _json(path)
    rows = content.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ALReportError(f'{path} is no profile: expected {{"header": {{...}}, "rows": [{{...}}, ...]}}')
    header = content.get("header")
    return Profile(path=path, header=header if isinstance(header, dict) else {}, rows=rows)


def number(value: Any) -> float | None:
    """Returns a finite number, or ``None`` for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def whole(value: Any) -> int | None:
    """Returns an integer, or ``None`` for anything else."""
    known = number(value)
    return int(known) if known is not None and known == int(known) else None


def numbers(value: Any) -> list[float]:
    """Returns the finite numbers of a list; a single number counts as a list of one."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [known for known in map(number, values) if known is not None]


def _block(run: RunRecord, key: str) -> dict[str, Any]:
    block = run.facts.get(key) or (run.config.get("experiment") or {}).get(key) or {}
    return dict(block) if isinstance(block, Mapping) else {"name": str(block)}


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ALReportError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ALReportError(f"{path} holds a {type(value).__name__}: expected a JSON object")
    return value


def _sound(content: dict[str, Any], file: str, notes: list[str]) -> dict[str, Any]:
    """Returns what a file holds without blocks and lists that are none, which are noted."""
    wrong = [key for key in _OBJECTS if not isinstance(content.get(key) or {}, dict)]
    bounds = content.get("partition") or []
    if not isinstance(bounds, list) or any(type(bound) is not int or bound < 0 for bound in bounds):
        wrong.append("partition")
    if wrong:
        notes.append(f"{file}: {', '.join(wrong)} left out, which can be no such thing")
    return {key: value for key, value in content.items() if key not in wrong}


def _is_losses(rows: Any) -> bool:
    """Whether a row of a batch has losses by layer, ``[[A, E], ...]``."""
    return isinstance(rows, list) and all(isinstance(row, list) for row in rows)


def _lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Reads the rows of a JSON-lines file; an interrupted run may leave a truncated line."""
    if not path.is_file():
        notes.append("metrics.jsonl is missing: no curves")
        return []
    rows, damaged = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            damaged += bool(line.strip())
    if damaged:
        notes.append(f"metrics.jsonl: {damaged} damaged line{'s' if damaged > 1 else ''} left out")
    return rows


def _trace(path: Path, notes: list[str]) -> list[TraceEvent]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.DictReader(line.replace("\0", "") for line in file)
        missing = [name for name in _TRACE_COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            notes.append(f"trace.csv has no column {', '.join(missing)}: no timeline")
            return []
        try:
            rows = list(reader)
        except csv.Error as error:
            notes.append(f"trace.csv cannot be read ({error}): no timeline")
            return []
    events = [event for event in map(_event, rows) if event is not None]
    if len(events) < len(rows):
        notes.append(f"trace.csv: {len(rows) - len(events)} damaged rows left out")
    if others := {event.copy for event in events} - {0}:
        notes.append(f"trace.csv has {1 + len(others)} data parallel copies of the pipeline: the first one is shown")
        events = [event for event in events if event.copy == 0]
    return sorted(events, key=lambda event: (event.start, event.stage))


def _event(row: Mapping[str, Any]) -> TraceEvent | None:
    def get(key: str) -> float | None:
        try:
            return number(float(row.get(key) or "nan"))
        except ValueError:
            return None

    stage, start, end = get("stage"), get("start"), get("end")
    if stage is None or start is None or end is None or end < start:
        return None
    return TraceEvent(
        stage=int(stage),
        instruction=str(row["instruction"]),
        micro_batch=whole(get("micro_batch")),
        layer=whole(get("layer")),
        start=start,
        end=end,
        wait=get("wait") or 0.0,
        nbytes=whole(get("nbytes")),
        memory=whole(get("memory")),
        copy=whole(get("copy")) or 0,
    )
