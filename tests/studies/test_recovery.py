"""What is made of the lines that the ranks of a job write: how long a death took, in which parts, and its picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ds_al.recovery import events
from ds_al.studies.bench.recovery import FORMS, PARTS, RUNNING, RecoveryCases, _row, measured
from ds_al.studies.bench.recovery_job import Ended, Job, lines
from ds_al.studies.deaths import Death, deaths, timeline
from ds_al.studies.tables.documents import TABLES

KILLED, STAGE, EVERY = 5, 1, 4


def write(path: Path, *written: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in written) + '{"what": "Back')  # the last one is cut off


def trained(number: int, start: float) -> dict[str, Any]:
    return {"what": "BackwardPass", "number": number, "start": start, "end": start + 0.5, "moment": start + 0.5}


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Stage 1 of two has received micro-batch 5 when it dies, at 105; it trains from micro-batch 4 again at 110."""
    job = Job(str(tmp_path / "job"), stages=2, every=EVERY, kills=((STAGE, KILLED),), recovers=True)
    write(tmp_path / "job" / "stage_0.jsonl", *(trained(k, 99.0 + k + 5 * (k > KILLED)) for k in range(8)))
    write(
        tmp_path / "job" / "stage_1.jsonl",
        *(trained(k, 100.0 + k) for k in range(KILLED)),
        {"what": "killed", "moment": 105.0, "number": KILLED},
        {"what": "ready", "moment": 109.0},
        {"what": "loaded", "moment": 109.5, "seconds": 0.5},
        *(trained(k, 106.0 + k) for k in range(4, 8)),
        {"what": "reformed", "moment": 115.0, "nbytes": 2**20},
    )
    return job


def test_the_parts_of_a_recovery_make_up_its_seconds(job: Job) -> None:
    folder = Path(job.folder) / "recovery"
    folder.mkdir()
    for event, moment, facts in (
        ("death", 105.25, {}),
        ("ready", 109.0, {}),
        ("loaded", 109.5, {"load": 0.5}),
        ("recovered", 112.0, {"reform": 0.25}),
    ):
        with (folder / events.FILE).open("a") as file:
            file.write(json.dumps({"event": event, "moment": moment, "rank": STAGE, **facts}) + "\n")
    found = measured(job, Ended([(120.0, 0)], ""))
    assert {part: found[part] for part in PARTS} == {
        "detect": 0.25, "start": 3.5, "load": 0.5, "reform": 0.25, "replay": 2.0,
    }  # fmt: skip
    assert found["seconds"] == 6.5 == sum(found[part] for part in PARTS)
    assert found["recomputed"] == 1 and found["replayed_bytes"] == 2**20


def test_a_job_that_starts_again_has_the_same_parts(job: Job) -> None:
    found = measured(Job(**{**vars(job), "recovers": False}), Ended([(106.0, 1), (120.0, 0)], ""))
    assert {part: found[part] for part in PARTS} == {
        "detect": 1.0, "start": 3.0, "load": 0.5, "reform": 0.0, "replay": 2.0,
    }  # fmt: skip


def test_the_table_has_a_line_per_form_and_the_cost_of_running(job: Job) -> None:
    one = measured(Job(**{**vars(job), "recovers": False}), Ended([(106.0, 1), (120.0, 0)], ""))
    rows = [_row(form, [one, {**one, "seconds": 7.5}]) for form in FORMS]
    rows += [_row(form, [{"recomputed": 0, "replayed_bytes": 0, "per_micro_batch": 0.1}]) for form in RUNNING]
    first, _, second = TABLES["recovery"](rows)
    assert [row[:3] for row in first.rows] == [[form, "2", "7.00 (6.75 to 7.25)"] for form in FORMS]
    assert [row[1:] for row in second.rows] == [["100.00", "1.000"]] * 2


def test_every_repetition_kills_at_another_micro_batch_between_the_same_saves(tmp_path: Path) -> None:
    cases = RecoveryCases(stages=3, micro_batches=4, batches=60, every=32, repeat=5)
    kills = [cases.job(tmp_path, number).kills for number in range(cases.repeat)]
    assert len(set(kills)) == 5 and {number // 32 for ((_, number),) in kills} == {3}


def test_a_timeline_shows_the_hole_and_what_is_trained_again(job: Job) -> None:
    assert deaths(lines(Path(job.folder), STAGE)) == [Death(KILLED, 105.0, 110.0, 111.5)]
    drawn = timeline("killed", job)
    own = [(piece.kind, piece.start, piece.end) for piece in drawn.slices if piece.row == STAGE]
    assert own[:2] == [("no process", 6.0, 11.0), ("trains again", 11.0, 12.5)]
    assert ("trains", 13.0, 13.5) in own and drawn.end == 14.5
