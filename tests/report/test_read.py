"""Reading run folders: what is there, what older versions lack, and what is no run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ds_al.errors import ALReportError
from ds_al.report.cells import group
from ds_al.report.read import read, read_run
from ds_al.report.results import accuracy
from tests.support.folders import make_run, make_seeds


def test_a_parent_folder_gives_all_runs_once(tmp_path: Path) -> None:
    make_seeds(tmp_path)
    runs, profiles = read([tmp_path, tmp_path / "vgg", tmp_path / "vgg" / "20261124-100000"])
    assert len(runs) == 6
    assert not profiles


def test_mean_and_sd_over_seeds(tmp_path: Path) -> None:
    make_seeds(tmp_path)
    cells = {cell.label: cell for cell in group(read([tmp_path])[0])}
    assert set(cells) == {"streaming", "bp_1f1b"}
    streaming = cells["streaming"].over_seeds(accuracy)
    assert (streaming.mean, streaming.sd, streaming.n) == (pytest.approx(0.91), pytest.approx(0.01), 3)
    twin = cells["bp_1f1b"].over_seeds(accuracy)  # 0.93, 0.93, 0.96: deviations -0.01, -0.01, 0.02
    assert (twin.mean, twin.sd) == (pytest.approx(0.94), pytest.approx((0.0006 / 2) ** 0.5))
    assert cells["bp_1f1b"].per_stage("bytes_sent") == []
    assert [one.mean for one in cells["streaming"].per_stage("idle")] == [pytest.approx(0.1), pytest.approx(0.05)]


def test_cells_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    make_run(tmp_path, seed=0)
    make_run(tmp_path, seed=1, stages=4)
    make_run(tmp_path, seed=2, stages=4, micro_batches=1)
    labels = [cell.label for cell in group(read([tmp_path])[0])]
    assert labels == [
        "streaming, 2 stages, 2 micro-batches",
        "streaming, 4 stages, 2 micro-batches",
        "streaming, 4 stages, 1 micro-batch",
    ]


def test_a_twin_with_a_head_more_is_not_named_by_its_layers(tmp_path: Path) -> None:
    make_run(tmp_path, layers=None)
    make_run(tmp_path, method="bp_1f1b", layers=None, partition=[0, 2, 4])
    assert [cell.label for cell in group(read([tmp_path])[0])] == ["streaming", "bp_1f1b"]


def test_a_trace_is_read_with_its_gaps(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path, trace=1))
    first = run.trace[0]
    assert (first.stage, first.instruction, first.micro_batch, first.layer) == (0, "ForwardPass", 0, None)
    assert (first.start, first.end, first.nbytes, first.memory) == (0.0, 1.0, None, 4096)
    received = next(event for event in run.trace if event.instruction == "RecvActivation")
    assert (received.wait, received.nbytes, received.memory) == (0.9, 400, None)


def test_of_several_copies_the_first_is_shown_and_the_others_are_named(tmp_path: Path) -> None:
    folder = make_run(tmp_path, trace=1)
    trace = folder / "trace" / "trace.csv"
    header, *rows = trace.read_text().splitlines()
    trace.write_text("\n".join([f"{header},copy", *(f"{row},{copy}" for copy in (0, 1) for row in rows)]) + "\n")
    (run,) = read([tmp_path])[0]
    assert len(run.trace) == len(rows)
    assert "trace.csv has 2 data parallel copies of the pipeline: the first one is shown" in run.notes


def test_a_damaged_trace_and_half_a_line_are_noted(tmp_path: Path) -> None:
    folder = make_run(tmp_path, trace=1)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "epo')
    with (folder / "trace" / "trace.csv").open("a") as file:
        file.write("x,ForwardPass\n")
    assert read_run(folder).notes == [
        "metrics.jsonl: 1 damaged line left out",
        "trace.csv: 1 damaged rows left out",
    ]
    (folder / "trace" / "trace.csv").write_text("a,b\n1,2\n")
    assert "no timeline" in read_run(folder).notes[1]


def test_an_unfinished_run_keeps_what_it_wrote(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path, finished=False))
    assert not run.finished
    assert len(run.epochs) == 2
    assert run.planned_epochs == 3
    assert run.training_seconds == 8.0
    assert run.test_accuracy == []


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    with pytest.raises(ALReportError, match=r"notes is not a run and holds none: expected config\.json"):
        read([tmp_path / "notes"])
    with pytest.raises(ALReportError, match="nowhere does not exist"):
        read([tmp_path / "nowhere"])
    with pytest.raises(ALReportError, match="got no runs"):
        read([])
    (tmp_path / "text.txt").write_text("")
    with pytest.raises(ALReportError, match="is a file"):
        read([tmp_path / "text.txt"])


def test_damaged_json_names_the_file(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    (folder / "summary.json").write_text("{")
    with pytest.raises(ALReportError, match=r"summary\.json cannot be read as JSON"):
        read([tmp_path])


def test_a_profile_is_read_and_others_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"header": {"date": "2026"}, "rows": [{"method": "streaming", "bubble": 0.1}]}))
    runs, profiles = read([path])
    assert not runs
    assert profiles[0].rows == [{"method": "streaming", "bubble": 0.1}]
    path.write_text("{}")
    with pytest.raises(ALReportError, match="is no profile"):
        read([path])
