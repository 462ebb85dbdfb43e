"""The study of faults in short: some cells of every table, the page, and stories of faults that once were not met."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ds_al.studies.reliability import faults, job, kills
from ds_al.studies.reliability.faults import Cell, first_error
from ds_al.studies.reliability.page import page
from ds_al.studies.reliability.study import KIND, PROMISES, study
from ds_al.studies.results import Results
from tests.support.scripts import call

SHORT = [
    # The other ranks once waited 300 s at their end for the part of a checkpoint that nobody would write any more.
    Cell("SIGKILL", "asynchronous save", "stages", 0),
    # With rank 0 the store is gone, and "no other rank told why" was all that was known.
    Cell("SIGKILL", "RecvGrad", "group", 0),
    # A stopped process stayed for ever where no launcher killed it.
    Cell("SIGSTOP", "save", "stages", 1),
    Cell("out of memory", "BackwardWeight", "group", 3),
    Cell("os._exit(0)", "ReduceGrads", "replicas", 1),
    Cell("full disk", "asynchronous save", "stages", 2),
    Cell("sys.exit(0)", "before the first", "stages", 1),
    Cell("exception", "evaluate", "stages", 1),
]


def broken(cells: list[Cell]) -> str:
    """What was not kept, of faults that are injected two at a time."""
    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(lambda cell: faults.run_cell(cell, stopped=2.0), cells))
    return "\n".join(
        f"{cell}: {row['failure']}\n{row['output']}" for cell, row in zip(cells, rows, strict=True) if row["failure"]
    )


@pytest.mark.distributed
@pytest.mark.alone
def test_a_job_with_a_fault_ends_and_leaves_nothing() -> None:
    assert broken(SHORT) == ""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.alone
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("place", faults.PLACES, ids=str)
def test_every_fault_at_every_place(place: tuple[str, str, int]) -> None:
    assert broken([cell for cell in faults.table() if (cell.place, cell.form, cell.rank) == place]) == ""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.alone
def test_a_run_that_was_killed_goes_on_in_its_folder() -> None:
    row = kills.series(0, kills=1, batches=40)
    assert row["failure"] == "" and row["rows"] == 40 and row["wandb_runs"] == 1


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.alone
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("number", [1, 2])
def test_kills_leave_no_trace(number: int) -> None:
    assert kills.series(number, kills=10)["failure"] == ""


def test_every_instruction_of_every_schedule_has_its_faults() -> None:
    executed = {"LoadMicroBatch", "RecvActivation", "RefreshDecoders", "SendDecoders", "ForwardPass", "SendActivation"}
    executed |= {"BackwardPass", "ReduceGrads", "OptimizerStep", "RecvGrad", "SendGrad", "BackwardInput"}
    assert {place for place, *_ in faults.PLACES} == executed | {"BackwardWeight", *job.CALLS}
    assert all(form in job.FORMS and rank < job.FORMS[form].ranks for _, form, rank in faults.PLACES)


def test_the_first_error_is_not_one_from_which_another_was_raised() -> None:
    text = (
        "Traceback (most recent call last):\nRuntimeError: Connection closed by peer\n\n"
        "The above exception was the direct cause of the following exception:\n\n"
        "Traceback (most recent call last):\nds_al.errors.ALTransportError: rank 1 failed\n"
    )
    assert first_error(text) == "ds_al.errors.ALTransportError: rank 1 failed"
    assert first_error("\nrank 0 (host): the process of rank 1 is stopped: the job ends\n").startswith("rank 0 (host)")
    assert first_error("all is well\n") == ""


ROWS: dict[str, list[dict[str, Any]]] = {
    "faults": [
        {"fault": "SIGKILL", "place": "load", "form": "stages", "rank": 0, "seconds": 1.25, "outcome": "ok"},
        {
            "fault": "SIGSTOP",
            "place": "load",
            "form": "stages",
            "rank": 0,
            "seconds": 30.0,
            "outcome": "hung",
            "failure": "x",
        },
    ],
    "soak": [{"what": "4 stages", "micro_batches": 200_000, "growth": 0.12345, "outcome": "wrong", "failure": "bits"}],
}


def results() -> Results:
    """Two of the parts, one of them of a kind that the page knows nothing about."""
    versions = dict.fromkeys(("ds_al", "torch"), "1")
    header = {"date": "d", "command": "make reliability", "machine": {"cores": 2, "cpu": "c"}, "versions": versions}
    more = {"key": "k", "done": True, "reason": "", "date": "d", "seconds": 1.0, "limit": 2.0}
    parts = [{"part": name, "title": name.title(), "rows": rows, **more} for name, rows in ROWS.items()]
    return Results("reliability", KIND, header, parts)


def test_the_page_counts_what_was_not_kept_and_says_what_was_not_run() -> None:
    text = page(results())
    assert text.startswith("# Reliability: 0 lost, 1 hung, 1 wrong\n")
    assert "| load | stages | 1.2 s | **hung** |" in text and "* x\n" in text
    assert "| 4 stages | 200000 | 0.1235 | wrong |" in text and "* bits" in text
    assert text.count("Not run yet.") == len(PROMISES) - 2
    assert page(None).startswith("# Reliability: not run\n")
    assert {part.name for part in study()} <= {promise.part for promise in PROMISES}


def test_the_command_writes_the_page_of_what_is_there(tmp_path: Path) -> None:
    files = ("--json", str(tmp_path / "r.json"), "--page", str(tmp_path / "r.md"))
    assert call("run/reliability.py", *files, "--page-only").returncode == 0
    assert (tmp_path / "r.md").read_text() == page(None)
    assert call("run/reliability.py", *files, "--only", "nothing").returncode == 2
