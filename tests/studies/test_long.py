"""Comparisons at long budgets: how a budget is found, what a sitting runs, and where a method is ahead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ds_al.errors import ALConfigError
from ds_al.studies.runs import RunFile
from ds_al.studies.sweep.along import along
from ds_al.studies.sweep.budget import Budgets, explanation, settle
from ds_al.studies.sweep.runner import execute
from ds_al.studies.sweep.sitting import expected_seconds, time_left
from ds_al.studies.sweep.spec import Run, read_sweep, runs_of, waiting
from ds_al.studies.tables import sweep as tables
from ds_al.studies.tables.write import document
from tests.support.ranks import ROOT

CONFIG = {
    "train_micro_batch_size_per_gpu": 100, "gradient_accumulation_steps": 3, "gradient_clipping": 0.0,
    "steps_per_print": None, "optimizer": {"type": "AdamW", "params": {"lr": 0.002, "torch_adam": True}},
    "experiment": {"name": "tiny", "model": {"name": "mlp"}, "data": {"name": "fashion-mnist-small"}},
}  # fmt: skip
SUITE = """
name: tiny
config: base.json
budget: budgets.json
groups:
  - name: Fashion, MLP
    budgets: [1, 2, 3]
    layers: [4]
    methods: {bp: {}, greedy: {}}
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    (tmp_path / "base.json").write_text(json.dumps(CONFIG))
    (tmp_path / "suite.yaml").write_text(SUITE)
    return tmp_path / "suite.yaml"


def done(accuracy: float) -> dict[str, Any]:
    return {"validation_accuracy": [accuracy]}


def test_the_budget_is_where_a_quarter_more_gains_less_than_half_a_point() -> None:
    assert settle({8: 0.60, 10: 0.61, 13: 0.614}) == 10
    assert settle({8: 0.60, 10: 0.61}) is None and settle({}) is None
    assert settle({8: 0.60, 10: 0.59}) == 8


def test_a_group_waits_for_its_budget_which_the_twin_alone_finds(suite: Path) -> None:
    sweep, folder = read_sweep(suite), suite.parent
    assert waiting(sweep, folder) == ["Fashion, MLP"] and not list(runs_of(sweep, folder=folder, seeds=1))
    budgets, found = Budgets(sweep, folder, seeds=2), {}
    for epochs, accuracy in ((1, 0.5), (2, 0.6), (3, 0.603)):
        todo = budgets.next(found)
        assert {run.method for run in todo} == {"bp"} and len(todo) == 2
        for run in todo:
            experiment = run.config["experiment"]
            assert (experiment["epochs"], experiment["test"]) == (epochs, False)
            found[run.key] = done(accuracy + 0.01 * run.seed)
    assert budgets.next(found) == []
    (row,) = budgets.rows(found)
    assert (row["epochs"], row["settled"], row["runs"]) == (2, True, 6)
    assert row["gain"] == pytest.approx(0.003)
    (folder / "budgets.json").write_text(json.dumps({"rows": [row]}))
    assert waiting(sweep, folder) == []
    assert {run.config["experiment"]["epochs"] for run in runs_of(sweep, folder=folder, seeds=1)} == {2}
    changed = runs_of(sweep, folder=folder, seeds=1, assignments=["experiment.epochs=7"])
    assert {run.config["experiment"]["epochs"] for run in changed} == {7}


def test_a_group_whose_twin_still_gains_takes_the_last_budget_and_says_so(suite: Path) -> None:
    budgets, found = Budgets(read_sweep(suite), suite.parent, seeds=1), {}
    for accuracy in (0.5, 0.6, 0.7):
        found |= {run.key: done(accuracy) for run in budgets.next(found)}
    (row,) = budgets.rows(found)
    assert (row["epochs"], row["settled"], row["gain"]) == (3, False, None)
    assert explanation(read_sweep(suite), suite.parent).endswith("by less than 0.5 points.")
    (suite.parent / "budgets.json").write_text(json.dumps({"rows": [row, {**row, "group": "of another sweep"}]}))
    text = explanation(read_sweep(suite), suite.parent)
    assert text.endswith(f"that was tried: {row['group']} (3 epochs: 10.00 points more than 2).")
    (suite.parent / "budgets.json").write_text(json.dumps({"rows": [{**row, "tried": {"3": 0.7}}]}))
    assert explanation(read_sweep(suite), suite.parent).endswith(f"that was tried: {row['group']} (3 epochs).")
    (suite.parent / "budgets.json").write_text(json.dumps({"rows": [{"group": row["group"], "epochs": 3}]}))
    assert explanation(read_sweep(suite), suite.parent).endswith("by less than 0.5 points.")
    no_budget = read_sweep(suite).model_copy(update={"budget": None})
    assert explanation(no_budget, suite.parent) == ""


def test_a_search_in_one_group_keeps_the_budgets_of_all_others(suite: Path) -> None:
    """The file of budgets, written by a search with --groups, lost all groups but that one."""
    one = SUITE.partition("groups:")[2]
    other = one.replace("Fashion", "Other").replace(
        "    layers", "    set: {experiment.label_smoothing: 0.1}\n    layers"
    )
    suite.write_text(SUITE + other)
    budgets, found = Budgets(read_sweep(suite), suite.parent, seeds=1), {}
    for name in ("Fashion", "Other"):
        for accuracy in (0.5, 0.6, 0.6):
            todo = budgets.next(found, groups=name)
            assert {run.group for run in todo} == {f"{name}, MLP"}
            found |= {run.key: done(accuracy) for run in todo}
        assert budgets.next(found, groups=name) == []
    assert [(row["group"], row["epochs"]) for row in budgets.rows(found)] == [("Fashion, MLP", 2), ("Other, MLP", 2)]


def test_budgets_that_grow_by_less_than_a_quarter_are_refused(suite: Path) -> None:
    suite.write_text(SUITE.replace("[1, 2, 3]", "[8, 9]"))
    with pytest.raises(ALConfigError, match=r"got \[8, 9\], expected numbers of epochs"):
        read_sweep(suite)


def test_a_sitting_estimates_its_time_and_leaves_what_does_not_fit(tmp_path: Path) -> None:
    def run(method: str, group: str = "A") -> Run:
        return Run(group, method, None, 2, 1, 0, {"experiment": {"epochs": 10, "name": method + group}})

    known = {"group": "A", "suite_method": "mse", "K": 2, "P": 1, "epochs": 5, "seconds": 100.0}
    found = {"x": known, "y": {**known, "suite_method": "greedy", "seconds": 300.0}}
    assert expected_seconds(run("mse"), found) == 200.0 and expected_seconds(run("greedy"), found) == 600.0
    assert expected_seconds(run("decoded"), found) == 400.0  # of the group's
    assert expected_seconds(run("mse", "B"), found) is None
    text = time_left([run("mse"), run("mse", "B")], found, jobs=2)
    assert text == "2 runs left, about 2 min with 2 at a time, and 1 whose time is not known yet"
    assert time_left([run("mse")], {}, jobs=2) == "1 runs left, whose time is not known yet, 2 at a time"  # not 0 min
    ended: list[Run] = []
    file = RunFile(tmp_path / "a.runs.jsonl")
    execute(
        [run("mse")], file=file, script=None, data=None, jobs=1, timeout=1.0,
        done=lambda each, result: ended.append(each), starts=lambda each: False,
    )  # fmt: skip
    assert not ended and not file.read()


def curve(method: str, seed: int, accuracies: list[float], **more: Any) -> dict[str, Any]:
    history = [{"epoch": n, "seconds": 2.0, "validation_accuracy": [a]} for n, a in enumerate(accuracies, start=1)]
    settings = {"group": "A", "suite_method": method, "method": method, "K": None, "P": 1, "seed": seed}
    return {**settings, "rho": 0.5, "history": history, **more}


def test_a_method_is_compared_at_equal_samples_operations_and_time() -> None:
    slow = [{"epoch": n, "seconds": 4.0, "validation_accuracy": [a]} for n, a in enumerate((0.2, 0.6, 0.6, 0.81), 1)]
    results = [
        curve("bp_1f1b", 0, [0.2, 0.4, 0.6, 0.8]), curve("bp_1f1b", 1, [0.2, 0.4, 0.6, 0.8]),
        *(curve("streaming", seed, [], K=2, suite_method="mse", history=slow) for seed in (0, 1)),
    ]  # fmt: skip
    found = {(row["by"], row["share"]): row for row in along(results)}
    assert {key[0] for key in found} == {"samples", "operations", "seconds"}
    assert found["samples", 0.5]["difference"] == pytest.approx(0.2) and found["samples", 0.5]["verdict"] == "ahead"
    assert found["samples", 0.75]["verdict"] == "level"
    assert found["operations", 0.25]["difference"] == pytest.approx(0.4)  # half the operations: two epochs by then
    assert ("seconds", 0.25) not in found  # its first epoch has not ended by then
    assert found["seconds", 0.5]["verdict"] == "behind" and found["seconds", 1.0]["difference"] == pytest.approx(-0.2)
    assert found["operations", 1.0]["difference"] == pytest.approx(0.01)
    alone = along([result for result in results if result["seed"] == 0])
    assert {row["verdict"] for row in alone} == {"level", "open"}
    text = document(tables.along(list(found.values())))
    assert "| `mse` | 2 | samples | +0.00 ± 0.00, level | +20.00 ± 0.00, ahead |" in text


@pytest.mark.slow
@pytest.mark.distributed
def test_the_commands_find_a_budget_and_use_it(suite: Path) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    suite.write_text(SUITE.replace("[1, 2, 3]", "[1, 2]"))
    common = ["--suite", str(suite), "--seeds", "1", "--set", "experiment.evaluate_fully=true", "--json"]
    for command in (
        [sys.executable, "run/budgets.py", *common, str(suite.parent / "budgets.json"), "--minutes", "5"],
        [sys.executable, "run/compare.py", *common, str(suite.parent / "out.json"), "--only-seeds", "0"],
    ):
        ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    (row,) = json.loads((suite.parent / "budgets.json").read_text())["rows"]
    assert row["runs"] == 2 and row["epochs"] in (1, 2)
    assert {row["by"] for row in json.loads((suite.parent / "out.along.json").read_text())["rows"]}
