"""``run/profile.py`` as a user starts it, on short cases. Times are not judged."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ranks import ROOT
from tests.support.scripts import call

pytestmark = [pytest.mark.distributed, pytest.mark.alone]
SHARES = ("busy", "wait_input", "wait_queue", "wait_data", "wait_barrier", "drained", "other")


def profile(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command as a user does, but for a new interpreter."""
    return call("run/profile.py", *arguments)


def test_sleeping_layers_give_rows_a_timeline_and_traces(tmp_path: Path) -> None:
    path = tmp_path / "out" / "profile.json"
    done = profile(
        *("--sleeping", "--methods", "streaming,sequential,bp_1f1b", "--stages", "2", "--micro-batches", "2,3"),
        *("--forward-ms", "5", "--backward-ms", "10", "--batches", "2", "--repeat", "2"),
        *("--json", str(path), "--trace", str(tmp_path / "traces")),
    )
    assert done.returncode == 0, done.stderr
    written = json.loads(path.read_text())
    rows = written["rows"]
    assert {"date", "command", "machine", "versions", "settings"} <= written["header"].keys()
    cases = [(m, method) for m in (2, 3) for method in ("streaming", "sequential", "bp_1f1b")]
    assert [(r["micro_batches"], r["method"], r["stage"]) for r in rows] == [(*c, s) for c in cases for s in (0, 1)]
    for row in rows:
        assert sum(row[name] for name in SHARES) == pytest.approx(1.0, abs=0.05)  # medians of two repetitions
        assert row["bubble_min"] <= row["bubble"] <= row["bubble_max"]
        assert row["bubble"] == pytest.approx(1 - row["busy"])
        assert row["difference"] == pytest.approx(row["bubble"] - row["bubble_formula"])
        assert row["forward_ms"] >= 5 and row["backward_ms"] >= 10
        assert row["workload"] == "sleeping"
    sequential = [row for row in rows if row["method"] == "sequential"]
    assert all(row["bubble_formula"] == pytest.approx(0.5) for row in sequential)
    by_case = {(r["method"], r["micro_batches"], r["stage"]): r for r in rows}
    assert by_case["bp_1f1b", 2, 1]["bytes_per_micro_batch"] == 16  # the gradient of (1, 4) floats
    assert by_case["streaming", 2, 1]["bytes_per_micro_batch"] == 0
    for method, m in ((method, m) for m, method in cases):
        shares = [by_case[method, m, stage]["critical_path"] for stage in (0, 1)]
        assert sum(shares) == pytest.approx(1.0)
    with path.with_suffix(".csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    names = {file.name for file in path.parent.iterdir()}
    assert {"profile-m2.png", "profile-m2.svg", "profile-m3.png", "profile-m3.svg"} <= names
    assert (tmp_path / "traces" / "streaming-m3" / "trace.json").exists()


def test_a_model_gives_its_memory_too(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    done = profile(
        *("--model", "mlp", "--methods", "streaming,bp_gpipe", "--stages", "2", "--micro-batches", "4"),
        *("--micro-batch", "8", "--batches", "1", "--repeat", "1", "--json", str(path)),
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert all(row["peak_bytes"] > 0 for row in rows)
    assert (tmp_path / "profile-memory-m4.png").exists() and (tmp_path / "profile-memory-m4.svg").exists()


def test_the_cost_of_tracing_is_measured_in_pairs(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    done = profile(
        *("--tracing-cost", "--model", "mlp", "--methods", "streaming", "--stages", "2", "--micro-batches", "2"),
        *("--batches", "1", "--repeat", "3", "--json", str(path)),
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(path.read_text())["rows"]
    assert row["pairs"] == 3 and row["ratio_low"] <= row["ratio"] <= row["ratio_high"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sleeping", "--methods", "gpipe"], "expected names of streaming,"),
        (["--sleeping", "--micro-batches", "2,4", "--figure", "x.png"], "--figure got 2 numbers"),
        ([], "one of the arguments --sleeping --model --tables is required"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], message: str) -> None:
    done = profile(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_it_does_not_hide_pythons_own_profile_from_scripts_beside_it() -> None:
    """run/profile.py lies first on the path of every script in run/, and cProfile imports ``profile``."""
    code = "import sys; sys.path.insert(0, 'run'); import cProfile, profile; cProfile.run('1'); profile.run('1')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
