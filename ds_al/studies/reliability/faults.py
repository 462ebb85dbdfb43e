"""Injects faults into the ranks of a small job without recovery, one at a time, and looks at how the job ends.

The ranks have no launcher that would end them, so each of them has to find its way out. Of every fault is checked:

    [1] hung     all processes have ended within :data:`LIMIT` seconds of the fault
    [2] wrong    no other rank ends with exit code 0
    [3] wrong    the first error that a rank shows has the cause of the first failure, on every rank
    [4] hung     no process that a rank has started is left
    [5] wrong    nothing listens on the port of the job
    [6] wrong    nothing of the job is left in /dev/shm
"""

from __future__ import annotations

import os
import re
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ds_al.launch.ranks import free_port, rank_environment, start_quickly
from ds_al.launch.warm import WarmProcess
from ds_al.studies.parts import tell_row
from ds_al.studies.reliability import job
from ds_al.studies.results import Row, StudyError

LIMIT = 30.0
"""Seconds from a fault to the end of all processes."""
_START = 240.0  # seconds for the job to come to the fault
_POLL = 0.02
_TAIL = 2000  # characters kept of what a rank printed
_BESIDE = 2  # jobs that run side by side
_SHORT = 2.0  # seconds after which a stopped process ends the job, but in the first of all jobs
_TRIES, _PORT = 3, "Address already in use"

FAULTS = ("SIGKILL", "SIGSTOP", "out of memory", "exception", "sys.exit(0)", "os._exit(0)")
"""Faults that may come anywhere; a full disk comes where files are written."""


@dataclass(frozen=True)
class Cell:
    """One fault.

    Attributes:
        fault: what happens, see :func:`ds_al.studies.reliability.job.strike`.
        place: where it happens: an instruction, or one of :data:`ds_al.studies.reliability.job.CALLS`.
        form: form of the job, one of :data:`ds_al.studies.reliability.job.FORMS`.
        rank: the rank to which it happens.
    """

    fault: str
    place: str
    form: str
    rank: int

    def __str__(self) -> str:
        return f"{self.fault}, {self.place}, {self.form}, rank {self.rank}"


PLACES = (
    ("LoadMicroBatch", "stages", 0),
    ("RecvActivation", "stages", 1),
    ("RefreshDecoders", "stages", 1),
    ("SendDecoders", "stages", 1),
    ("ForwardPass", "stages", 2),
    ("SendActivation", "stages", 0),
    ("BackwardPass", "stages", 1),
    ("OptimizerStep", "stages", 2),
    ("ReduceGrads", "replicas", 1),
    ("RecvActivation", "group", 2),
    ("ForwardPass", "group", 1),
    ("SendActivation", "group", 0),
    ("RecvGrad", "group", 0),
    ("BackwardInput", "group", 1),
    ("BackwardWeight", "group", 3),
    ("SendGrad", "group", 3),
    ("OptimizerStep", "group", 2),
    ("before the first", "stages", 1),
    ("after the last", "stages", 1),
    ("evaluate", "stages", 1),
    ("save", "stages", 1),
    ("save", "group", 0),
    ("asynchronous save", "stages", 0),
    ("asynchronous save", "stages", 2),
    ("load", "stages", 2),
)
"""``(place, form, rank)``: every instruction, before the first and after the last one, and calls."""


def table() -> list[Cell]:
    """Returns all faults."""
    cells = [Cell(fault, *where) for where in PLACES for fault in FAULTS]
    return cells + [Cell("full disk", *where) for where in PLACES if where[0].endswith("save")]


def run(*, seconds: float) -> None:
    """Part of the study: tells a row for each fault of the table; two at a time, since a job mostly waits."""
    end, cells = time.monotonic() + seconds - LIMIT, table()
    start_quickly()
    with ThreadPoolExecutor(_BESIDE) as pool:
        rows = [pool.submit(_in_time, cell, end, _SHORT if number else None) for number, cell in enumerate(cells)]
        for number, row in enumerate(rows):
            if (told := row.result()) is None:
                raise StudyError(f"{number} of {len(cells)} faults were injected: run it again with more --minutes")
            tell_row(told)


def _in_time(cell: Cell, end: float, stopped: float | None) -> Row | None:
    return run_cell(cell, stopped=stopped) if time.monotonic() < end else None


def run_cell(cell: Cell, *, stopped: float | None = None) -> Row:
    """Injects one fault, and returns what came of it.

    Args:
        stopped: see :func:`ds_al.studies.reliability.job.run`.

    Returns:
        ``fault, place, form, rank, seconds, codes, cause, outcome, failure, output``: ``outcome`` is ``ok``, ``hung``
        or ``wrong``, and ``failure`` says why. ``cause`` is the first error that was shown, ``output`` the end of all
        that was, empty where the outcome is ``ok``.
    """
    for _ in range(_TRIES):
        codes, seconds, left, outputs = _run(cell, stopped)
        if seconds is not None or _PORT not in "".join(outputs):  # another process has taken the port meanwhile
            break
    causes = [cause for output in outputs if (cause := first_error(output))]
    failure, outcome = _judge(cell, codes, seconds, causes, left)
    return {
        "fault": cell.fault,
        "place": cell.place,
        "form": cell.form,
        "rank": cell.rank,
        "seconds": seconds,
        "codes": codes,
        "cause": next(iter(causes), "")[:400],
        "outcome": outcome,
        "failure": failure,
        "output": "\n".join(f"--- rank {rank}\n{text[-_TAIL:]}" for rank, text in enumerate(outputs))
        if failure
        else "",
    }


def _run(cell: Cell, stopped: float | None) -> tuple[list[int | None], float | None, list[str], list[str]]:
    """Runs the job; returns exit codes, seconds since the fault, what is left, and the outputs of the ranks."""
    port, ranks = free_port(), job.FORMS[cell.form].ranks
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"log{rank}") for rank in range(ranks)]
        processes = []
        for rank, log in enumerate(logs):
            log.touch()
            environment = rank_environment(rank, ranks, port)
            processes.append(WarmProcess(_rank, cell, folder, stopped, env=environment, log=log))
        try:
            codes, seconds = _wait(processes, Path(folder, job.STRUCK))
            left = list(_left(processes, port))
        finally:
            _end(processes)
        return codes, seconds, left, [log.read_text(errors="replace") for log in logs]


def _rank(cell: Cell, folder: str, stopped: float | None) -> None:
    job.run(cell.form, fault=cell.fault, place=cell.place, rank=cell.rank, folder=folder, stopped=stopped)


def _wait(processes: Sequence[WarmProcess], struck: Path) -> tuple[list[int | None], float | None]:
    """Waits for the end of all processes; returns their exit codes, and the seconds since the fault, if it came."""
    start, at = time.monotonic(), None
    while True:
        codes = [process.poll() for process in processes]
        now = time.monotonic()
        if at is None and struck.exists() and (text := struck.read_text()):
            at = float(text)
        if at is not None and (None not in codes or now - at > LIMIT):
            return codes, now - at
        if at is None and (any(code is not None for code in codes) or now - start > _START) and not struck.exists():
            return codes, None
        time.sleep(_POLL)


def _left(processes: Sequence[WarmProcess], port: int) -> Iterator[str]:
    """Yields what a job has left on the machine."""
    sessions = {process.pid for process in processes}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = path.read_text().rpartition(")")
        except OSError:
            continue
        state, _, _, session, *_ = rest.split()
        if int(session) in sessions and state != "Z":
            yield f"process {name.replace('(', '')} is left"
    if any(_listens(row, port) for name in ("tcp", "tcp6") for row in Path("/proc/net", name).read_text().splitlines()):
        yield f"port {port} is still listened on"
    own = re.compile(rf"_{port}_|(^|[_.-])({'|'.join(map(str, sessions))})([_.-]|$)")
    yield from (f"/dev/shm/{path.name} is left" for path in Path("/dev/shm").iterdir() if own.search(path.name))


def _listens(row: str, port: int) -> bool:
    fields = row.split()
    return len(fields) > 3 and fields[3] == "0A" and fields[1].endswith(f":{port:04X}")


def _end(processes: Sequence[WarmProcess]) -> None:
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


# ---- what is promised ------------------------------------------------------------------------------


def _judge(
    cell: Cell, codes: Sequence[int | None], seconds: float | None, causes: Sequence[str], left: Sequence[str]
) -> tuple[str, str]:
    """Returns the first promise that is broken, empty if none is, and the outcome."""
    others = [code for rank, code in enumerate(codes) if rank != cell.rank]
    expected = _causes(cell)
    other = [cause for cause in causes if not re.search(expected, cause)] if causes else ["none"]
    checks: list[tuple[bool, str, str]] = [
        (seconds is not None, "wrong", "the job did not come to the fault"),
        (None not in codes, "hung", f"exit codes {list(codes)} after {seconds or 0:.0f} s"),
        (0 not in others, "wrong", f"exit codes {list(codes)}"),
        (not other, "wrong", f"got the error {next(iter(other), '')!r} first, expected {expected!r}"),
        (not any(what.startswith("process") for what in left), "hung", "; ".join(left)),
        (not left, "wrong", "; ".join(left)),
    ]
    return next(((failure, outcome) for fine, outcome, failure in checks if not fine), ("", "ok"))


def _causes(cell: Cell) -> str:
    """Returns a pattern of the cause of a fault."""
    calls = cell.place not in ("before the first", "after the last")
    killed = rf"the process of rank {cell.rank} \(.*\) has gone"
    return {
        "SIGKILL": killed,
        "SIGSTOP": rf"the process of rank {cell.rank} \(.*\) is stopped",
        "out of memory": r"not enough memory|can't allocate memory|MemoryError|Cannot allocate memory",
        "exception": "ArithmeticError: injected",
        "sys.exit(0)": r"sys\.exit\(0\) was called inside|SystemExit: 0"
        if calls
        else rf"rank {cell.rank} .*had come to the end",
        "os._exit(0)": killed,
        "full disk": "File too large",
    }[cell.fault]


_ERROR = re.compile(r"^(?:[\w.]*(?:Error|Exit|Interrupt|Failure)\b.*|rank \d+ \(.*)$", re.MULTILINE)
_RANK = re.compile(r"^\[rank\d+\]: ?", re.MULTILINE)  # how torch begins the lines of an exception
_CHAINED = re.compile(r"\s*(The above exception was the direct cause|During handling of the above exception)")


def first_error(output: str) -> str:
    """Returns the first line that names an error, other than one from which another error was raised.

    What torch itself logs of a lost connection, without naming an error of Python, is none.
    """
    output = _RANK.sub("", output)
    for found in _ERROR.finditer(output):
        if not _CHAINED.match(output, found.end()):
            return found.group()
    return ""
