"""The commands of run/scaling.py, end to end on small cases. Times are not judged."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from ds_al.studies.bench.scaling import METHODS
from tests.support.ranks import ROOT

pytestmark = [pytest.mark.distributed, pytest.mark.alone]


@pytest.fixture(scope="module")
def command() -> Any:
    """``run/scaling.py`` as a module, which saves a start of Python for each call."""
    spec = importlib.util.spec_from_file_location("run_scaling", ROOT / "run/scaling.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_sleeping_layers_scale_by_every_method(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out" / "scaling.json"
    short = ["--forward-ms", "2", "--backward-ms", "3", "--batches", "2", "--micro-batches", "3", "--repeat", "2"]
    sizes = ["--study", "strong", "--strong", "2", "--layers", "4"]
    run(command, monkeypatch, "--sleeping", *sizes, *short, "--json", str(path))
    written = json.loads(path.read_text())
    assert written["header"]["settings"]["threads_per_rank"] == 1
    assert [row["method"] for row in written["rows"]] == list(METHODS)
    for row in written["rows"]:
        assert (row["study"], row["stages"], row["layers"], row["repeats"]) == ("strong", 2, 4, 2)
        assert row["basis"] == "measured" and row["speedup"] is None  # one stage was not timed
        assert row["batches"] == (2 if row["method"] == "streaming" else 1)
        assert row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
        assert row["seconds"] >= row["ideal"] > 0 and len(row["busy_by_stage"]) == 2
        assert row["busy_seconds"] >= row["batches"] * (4 if row["method"] == "bp_dp" else 3) * 2 * 0.005
    assert written["rows"][-1]["ideal"] == pytest.approx(2 * 4 * 0.005)  # two of three micro-batches, four layers
    shown = capsys.readouterr().out
    assert "about " in shown and "strong, stages: 2, layers: 4, bp_dp" in shown
    with path.with_suffix(".csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(METHODS)


@pytest.mark.parametrize("measurement", ["--ceiling", "--against-1f1b"])
def test_two_stages_are_measured_beside_what_they_could_be(
    measurement: str, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "two.json"
    short = ["--model", "transformer", "--micro-batch", "2", "--micro-batches", "2", "--total", "4", "--repeat", "2"]
    run(command, monkeypatch, measurement, *short, "--json", str(path))
    rows = json.loads(path.read_text())["rows"]
    if measurement == "--ceiling":
        assert [row["method"] for row in rows] == ["streaming", "ceiling"]
        assert rows[1]["share_of_ceiling"] == 1.0 and rows[0]["share_of_ceiling"] > 0
        assert rows[0]["batches"] == 2 and 0 < rows[0]["balance"] <= 1
        assert rows[0]["cuts"][0] == 0 and rows[0]["cuts"][-1] == 5
    else:
        (row,) = rows
        assert row["batches"] == 2 and row["repeats"] == 2
        assert row["bound"] == pytest.approx(3 / (2 * row["rho"]))
        assert row["wins"] == (row["ratio"] > 1)
        assert row["twin_cuts"][-1] == 6 and path.with_suffix(".svg").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --sleeping, --ceiling, --against-1f1b, --tables, --draw, or --model transformer"),
        (["--model", "vgg"], "--model transformer for the studies"),
        (["--sleeping", "--methods", "gpipe"], "expected names of streaming,"),
        (["--sleeping", "--micro-batches", "2,4"], "give one, or use --against-1f1b"),
        (["--sleeping", "--strong", "5"], "got 12 layers for 5 stages"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: list[str],
    message: str,
    command: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(command, monkeypatch, *arguments)
    assert message in capsys.readouterr().err + str(ended.value)


def run(command: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["run/scaling.py", *arguments])
    command.main()
