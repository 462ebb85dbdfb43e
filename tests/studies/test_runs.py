"""The file of a sweep's runs: nothing is lost to an interruption or to a second process, and a cut line is dropped."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from ds_al.studies.results import StudyError, now
from ds_al.studies.runs import RunFile


def keep_many(path: str, process: int, count: int) -> None:
    for number in range(count):
        RunFile(Path(path)).keep(f"{process}-{number:03d}", {"value": "x" * 2000, "process": process})


def test_runs_are_lines_in_the_order_of_their_keys_and_a_later_result_replaces_an_earlier_one(tmp_path: Path) -> None:
    runs = RunFile.beside(tmp_path / "small.json")
    assert (runs.name, runs.read()) == ("small", {})
    for key, value in (("b", 1), ("a", 2), ("b", 3)):
        runs.keep(key, {"date": "2026-01-31 23:59:59", "value": value})
    start = '{"key": "%s", "date": "2026-01-31 23:59:59", "value": %d}\n'
    assert runs.path.read_text() == start % ("a", 2) + start % ("b", 3)
    assert [result["value"] for result in runs.read().values()] == [2, 3]


def test_a_run_without_a_date_gets_that_of_its_end(tmp_path: Path) -> None:
    runs, before = RunFile.beside(tmp_path / "small.json"), now()
    runs.keep("a", {"value": 2})
    assert before <= runs.read()["a"]["date"] <= now()


def test_two_processes_write_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "both.runs.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=keep_many, args=(str(path), number, 40)) for number in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    found = RunFile(path).read()
    assert len(found) == 80 and all(len(result["value"]) == 2000 for result in found.values())


def test_a_killed_writer_leaves_whole_lines_and_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "killed.runs.jsonl"
    writer = multiprocessing.get_context("fork").Process(target=keep_many, args=(str(path), 0, 100000))
    writer.start()
    while not (path.exists() and len(RunFile(path).read()) > 5):
        time.sleep(0.01)
    assert writer.pid is not None
    os.kill(writer.pid, signal.SIGKILL)
    writer.join(60)
    before = len(RunFile(path).read())
    RunFile(path).keep("z", {})
    assert len(RunFile(path).read()) == before + 1


def test_a_last_line_that_was_cut_is_dropped_with_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = RunFile(tmp_path / "cut.runs.jsonl")
    runs.path.write_text('{"key": "a", "value": 1}\n{"key": "b", "val')
    assert list(runs.read()) == ["a"] and "the last line was cut" in capsys.readouterr().err
    runs.keep("c", {"value": 2})
    assert [json.loads(line)["key"] for line in runs.path.read_text().splitlines()] == ["a", "c"]


def test_a_broken_line_in_the_middle_and_a_foreign_file_are_refused(tmp_path: Path) -> None:
    runs = RunFile(tmp_path / "broken.runs.jsonl")
    runs.path.write_text('{"key": "a"\n{"key": "b"}\n')
    with pytest.raises(StudyError, match=r"broken.runs.jsonl, line 1: got .*remove the line"):
        runs.read()
    with pytest.raises(StudyError, match=r"expected a name that ends in .runs.jsonl"):
        RunFile(tmp_path / "small.cells")
