"""The commands of run/bench.py, end to end on small cases. Times are not judged."""

from __future__ import annotations

import csv
import json
import subprocess
from pathlib import Path

import pytest

from ds_al.planner.formulas import ideal_seconds
from ds_al.studies.bench.cases import measure_memory
from ds_al.studies.bench.forms import Network
from ds_al.studies.bench.layers import measure_layers
from ds_al.studies.bench.recipe_time import measure_recipe
from ds_al.studies.bench.rivals import one_layer_cuts
from ds_al.studies.bench.workloads import METHODS
from ds_al.studies.results import read
from ds_al.studies.tables.documents import tables_of
from tests.support.scripts import call

pytestmark = [pytest.mark.distributed, pytest.mark.alone]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command as a user does, but for a new interpreter."""
    return call("run/bench.py", *arguments)


def test_sleeping_writes_a_row_for_every_method(tmp_path: Path) -> None:
    path = tmp_path / "out" / "sleeping.json"
    short = ["--forward-ms", "5", "--backward-ms", "5", "--batches", "2", "--repeat", "1"]
    done = bench("--sleeping", "--stages", "2", "--micro-batches", "2", *short, "--json", str(path))
    assert done.returncode == 0, done.stderr
    written = json.loads(path.read_text())
    assert {"date", "command", "machine", "versions", "settings"} <= written["header"].keys()
    assert [row["method"] for row in written["rows"]] == list(METHODS)
    for row in written["rows"]:
        ideal = ideal_seconds(row["method"], stages=2, micro_batches=2, batches=2, forward=0.005, backward=0.005)
        assert (row["stages"], row["micro_batches"], row["batches"]) == (2, 2, 2)
        assert row["ideal"] == ideal
        assert row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
        assert row["efficiency"] == pytest.approx(ideal / row["seconds"])
        assert row["method"] in done.stdout
    with path.with_suffix(".csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(METHODS)


def test_repartition_writes_a_row_for_every_phase(tmp_path: Path) -> None:
    path = tmp_path / "repartition.json"
    short = ["--forward-ms", "1", "--backward-ms", "1", "--batches", "2", "--micro-batches", "1"]
    done = bench("--repartition", "--stages", "2", *short, "--json", str(path))
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert [(row["moves"], row["phase"]) for row in rows] == [
        (moves, phase) for moves in (False, True) for phase in ("before", "during", "after")
    ]
    assert [row["best"] for row in rows[:3]] == pytest.approx([1 / 0.008, 1 / 0.012, 1 / 0.008])  # 4 of 2 ms, 3 of 4
    assert all(row["bounds"] == "0 4 8" for row in rows[:3])


def test_memory_is_flat_for_streaming_and_grows_for_backprop() -> None:
    rows = measure_memory(
        methods=("streaming", "bp_1f1b", "bp_gpipe"), stages=(3,), micro_batches=(2, 4, 8), width=16, micro_batch=4
    )
    dense = [row for row in rows if row["workload"] == "dense"]
    held = {(row["method"], row["micro_batches"], row["stage"]): row["peak_bytes"] for row in dense}
    assert len(held) == len(dense) == 27
    for stage in range(3):
        assert held["streaming", 2, stage] == held["streaming", 4, stage] == held["streaming", 8, stage] > 0
        assert held["bp_gpipe", 2, stage] * 4 == held["bp_gpipe", 4, stage] * 2 == held["bp_gpipe", 8, stage]
    assert held["bp_1f1b", 2, 0] < held["bp_1f1b", 4, 0] == held["bp_1f1b", 8, 0]  # min(P - stage, M) micro-batches
    again = {(r["layers"], r["checkpoint_interval"]): r["peak_bytes"] for r in rows if r["workload"] == "transformer"}
    assert again[8, 1] == again[8, 2] < 0.5 * again[8, 0]  # one block per layer: there are no two to join
    assert again[1, 1] < again[1, 2] < again[1, 0]
    assert {row.keys() == rows[0].keys() for row in rows} == {True}  # one CSV holds all


def test_layers_are_timed_with_their_step() -> None:
    rows = measure_layers(models=("mlp", "lstm"), micro_batch=2, repeat=1)
    assert [(row["model"], row["layer"]) for row in rows] == [(m, i) for m in ("mlp", "lstm") for i in range(4)]
    for row in rows:
        assert min(row[name] for name in ("forward_ms", "backward_ms", "step_ms", "step_loop_ms", "parameters")) > 0
        assert row["u"] == pytest.approx(row["step_ms"] / (row["forward_ms"] + row["backward_ms"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sleeping", "--stages", "0"], "expected a whole number from 1 on"),
        (["--sleeping", "--methods", "gpipe"], "expected names of streaming,"),
        (["--sleeping", "--markdown", "x.md"], "--markdown goes with --memory"),
        (["--overhead", "--dropout", "0.1"], "--dropout goes with --cores"),
        (["--cores", "--model", "vgg", "--dropout", "0.1"], "networks of texts alone have it"),
        (["--cores", "--dropout", "1"], "argument --dropout: got '1': expected a number from 0 to below 1"),
        (["--layers", "--model", "vgk"], "got AL model 'vgk': expected one of"),
        ([], "one of the arguments --sleeping"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], message: str) -> None:
    done = bench(*arguments)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.slow
def test_a_recipe_and_its_twin_take_turns() -> None:
    row, *variants = measure_recipe(networks=("vgg",), layers=(2,), repeat=2)
    assert row["variant"] == "" and [other["variant"] for other in variants] == ["half bridges", "bridges 3/4"]
    assert (row["network"], row["K"], row["micro_batch"], row["repeats"]) == ("vgg", 2, 100, 2)
    (many,) = measure_recipe(recipe="many_classes", layers=(2,), repeat=1)
    assert (many["recipe"], many["variant"]) == ("many_classes", "")
    assert row["al_ms"] > 0 < row["twin_ms"] and row["ratio_low"] <= row["ratio"] <= row["ratio_high"]


def test_the_dial_is_timed_beside_the_rivals(tmp_path: Path) -> None:
    path = tmp_path / "dial.json"
    short = ["--forward-ms", "2", "--backward-ms", "4", "--batches", "1", "--repeat", "1", "--micro-batches", "4"]
    done = bench("--dial", "--stages", "2", *short, "--json", str(path))
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    rivals = ["bp_1f1b", "bp_zb_h1", "bp_zb_h2", "bp_dualpipev"]
    assert [row["method"] for row in rows] == ["groups"] * 3 + ["streaming", *rivals]
    assert [row["graphs_held"] for row in rows] == [row["graphs_formula"] for row in rows]
    assert "times the best rival" in tables_of(read(path))


def test_one_layer_has_the_same_weights_on_each_stage_as_its_rivals() -> None:
    """The twin's cut before block 2 was once taken for one before module 2 of a VGG's f: K = 1 was measured with most
    of the network on one stage."""
    assert one_layer_cuts(Network("vgg", 2, 2), [1, 2, 3, 4]) == [4, 8, 12, 16]
    assert one_layer_cuts(Network("resnet", 2, 2), [1, 2, 3]) == [5, 7, 9]
    assert one_layer_cuts(Network("transformer", 2, 2), [1, 2, 3, 4]) == [1, 2, 3, 4]


def test_real_networks_are_measured_beside_the_rivals(tmp_path: Path) -> None:
    path = tmp_path / "cores.json"
    short = ["--model", "mlp", "--micro-batches", "2,4", "--total", "4", "--micro-batch", "2", "--repeat", "1"]
    done = bench("--cores", *short, "--json", str(path))
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert [(row["micro_batches"], row["method"]) for row in rows if row["method"] == "bp_dualpipev"] == [
        (4, "bp_dualpipev")
    ]
    assert len(rows) == 5 + 6 and all(row["samples_per_s"] > 0 for row in rows)
    for row in rows:
        assert (row["method"] == row["rival"]) <= (row["over_rival"] == 1)
    assert "times the best rival" in tables_of(read(path))
