"""Stores the runs of a sweep in one file, ``<name>.runs.jsonl``: a line per run, sorted by key.

Saved runs persist: an interrupted sweep continues where it stopped, and two sweeps may write to one file concurrently.
Temporary files of a sweep (configs, run folders, the lock) are in the folder ``<name>.runs``, which git ignores.
"""

from __future__ import annotations

import fcntl
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ds_al.studies.results import StudyError, now

Result = dict[str, Any]
SUFFIX = ".runs.jsonl"


def same_machine(run: Mapping[str, Any], other: Mapping[str, Any] | None) -> bool:
    """Whether the times of two runs can be compared: both ran on one machine, which was not restarted in between.

    Runs without the field ``boot`` (:func:`ds_al.system.provenance.boot`), which older versions saved, can be compared
    with each other. Without another run, ``None``, nothing contradicts.
    """
    return other is None or run.get("boot") == other.get("boot")


class Keyed(Protocol):
    """A run that has a name of its own."""

    @property
    def key(self) -> str:
        """The name, which encodes the settings of the run."""


AnyRun = TypeVar("AnyRun", bound=Keyed)


class RunFile:
    """Results of runs by key.

    Args:
        path: the file; it need not exist.

    Raises:
        StudyError: the path has another suffix.
    """

    def __init__(self, path: Path) -> None:
        if not path.name.endswith(SUFFIX):
            raise StudyError(f"file of runs: got {str(path)!r}, expected a name that ends in {SUFFIX}")
        self.path = path

    @classmethod
    def beside(cls, results: Path) -> RunFile:
        """Returns the run file that belongs to a results file: ``small.runs.jsonl`` to ``small.json``."""
        return cls(results.with_suffix(SUFFIX))

    @property
    def name(self) -> str:
        """Name of the sweep: the file's name without its suffix."""
        return self.path.name.removesuffix(SUFFIX)

    @property
    def scratch(self) -> Path:
        """Folder of the temporary files of a sweep."""
        return self.path.with_name(f"{self.name}.runs")

    def read(self) -> dict[str, Result]:
        """Returns all results by key, in the order of the keys.

        A truncated last line (full disk, interrupted copy) is skipped with a message on stderr.

        Raises:
            StudyError: another line is not a JSON object with a key.
        """
        if not self.path.exists():
            return {}
        lines = self.path.read_text().split("\n")
        found: dict[str, Result] = {}
        for number, line in enumerate(lines, start=1):
            if not line:
                continue
            try:
                result = json.loads(line)
                found[result["key"]] = result
            except (ValueError, KeyError, TypeError) as error:
                if number < len(lines):  # a complete line ends in a newline, after which the list has one more entry
                    raise StudyError(
                        f"{self.path}, line {number}: got {line[:60]!r} ({error}), expected a JSON object with a "
                        "'key': remove the line, and its run is repeated"
                    ) from error
                print(f"{self.path}: the last line was cut; its run is left out, and repeated", file=sys.stderr)
        return dict(sorted(found.items()))

    def get(self, key: str) -> Result | None:
        """Returns the result of a key, or ``None``."""
        return self.read().get(key)

    def keep(self, key: str, result: Result) -> None:
        """Adds a result, or replaces the one of this key; one without a ``date`` gets that of this moment.

        The file is replaced atomically under a lock: readers see it either without or with the new line.
        """
        with self._locked():
            found = {**self.read(), key: {"key": key, "date": now(), **result}}
            lines = [json.dumps(found[each]) + "\n" for each in sorted(found)]
            unfinished = self.scratch / f"{self.path.name}.part"
            unfinished.write_text("".join(lines))
            unfinished.replace(self.path)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.scratch.mkdir(parents=True, exist_ok=True)
        with (self.scratch / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed, even if the process is killed
            yield


def run_missing(
    runs: Sequence[AnyRun],
    file: RunFile,
    train: Callable[[AnyRun], Result],
    *,
    done: Callable[[AnyRun, Result, bool], None],
    until: float = math.inf,
) -> None:
    """Executes the missing runs and saves each result; a run that failed is repeated the next time.

    Another process may write to the same file, so that its runs are not repeated here.

    Args:
        runs: all runs.
        file: file of results.
        train: executes one run.
        done: called with each run, its result, and whether the result already existed.
        until: time of :func:`time.monotonic` after which no run is started.
    """
    for run in runs:
        result = file.get(run.key)
        known = result is not None and "failure" not in result
        if result is None or not known:
            if time.monotonic() > until:
                return
            try:
                result = {"key": run.key, **train(run)}
            except Exception as error:  # a failure is also a result
                result = {"key": run.key, "failure": f"{type(error).__name__}: {error}"}
            file.keep(run.key, result)
        done(run, result, known)
