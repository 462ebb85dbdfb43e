"""Suites of comparisons: which runs there are, and what their table says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ds_al.errors import ALConfigError
from ds_al.experiment.recipes import RECIPES
from ds_al.studies.sweep.along import along
from ds_al.studies.sweep.choice import choose
from ds_al.studies.sweep.exits import exit_table
from ds_al.studies.sweep.page import groups_page, results_page
from ds_al.studies.sweep.picture import draw_group, method_look
from ds_al.studies.sweep.spec import Run, read_sweep, runs_of, waiting, with_methods
from ds_al.studies.sweep.table import rows, twins_of
from ds_al.studies.tables import sweep as tables
from ds_al.studies.tables.sweep import twin_of
from ds_al.studies.tables.write import document

CONFIG = {
    "train_micro_batch_size_per_gpu": 50,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.002}},
    "experiment": {
        "name": "tiny", "model": {"name": "mlp"}, "data": {"name": "fashion-mnist-small"}, "epochs": 1
    },
}  # fmt: skip
SUITE = """
name: tiny
config: base.json
groups:
  - name: Fashion, MLP
    set: {experiment.epochs: 2}
    layers: [2, 4]
    stages: [1, 2]
    methods:
      bp: {}
      bp_1f1b: {}
      mse: {}
      contrast: {experiment.model.al_options.objective.temperature: 0.05}
      cold: {method: contrast, experiment.model.al_options.objective.temperature: 0.01}
"""


def sweep(folder: Path, text: str = SUITE, *, seeds: int = 2) -> list[Run]:
    (folder / "base.json").write_text(json.dumps(CONFIG))
    (folder / "suite.yaml").write_text(text)
    return list(runs_of(read_sweep(folder / "suite.yaml"), folder=folder, seeds=seeds))


def test_back_propagation_runs_once_for_all_numbers_of_layers(tmp_path: Path) -> None:
    found = sweep(tmp_path)
    per_seed = [(run.method, run.layers, run.stages) for run in found if run.seed == 0]
    objectives = [(method, k, p) for p in (1, 2) for method in ("mse", "contrast", "cold") for k in (2, 4)]
    assert sorted(set(per_seed), key=str) == sorted(
        {("bp", None, 1), ("bp_1f1b", None, 1), ("bp_1f1b", None, 2), *objectives}, key=str
    )
    assert [run.seed for run in found] == [0] * len(per_seed) + [1] * len(per_seed)


def test_methods_set_schedule_objective_and_their_own_keys(tmp_path: Path) -> None:
    by_method = {run.method: run.config for run in sweep(tmp_path) if run.layers in (None, 4) and run.seed == 1}
    assert by_method["bp"]["associated_learning"]["method"] == "bp_1f1b"
    assert by_method["mse"]["associated_learning"]["method"] == "streaming"
    options = by_method["cold"]["experiment"]["model"]["al_options"]
    assert options == {"num_layers": 4, "objective": {"name": "contrast", "temperature": 0.01}}
    assert by_method["mse"]["experiment"]["epochs"] == 2 and by_method["mse"]["experiment"]["seed"] == 1


def test_methods_that_no_group_has_are_added_by_name(tmp_path: Path) -> None:
    """They take over what was chosen for ``bp``; ``bp_single`` is one process, ``bp_dp`` as many as there are."""
    (tmp_path / "base.json").write_text(json.dumps(CONFIG))
    choice = {"rows": [{"group": "Tuning", "method": name, "keys": {"optimizer.params.lr": rate}}
                       for name, rate in (("bp", 0.5), ("mse", 0.25), ("contrast", 0.125))]}  # fmt: skip
    (tmp_path / "chosen.json").write_text(json.dumps(choice))
    text = SUITE.replace("config: base.json", "config: base.json\nchosen: [chosen.json]")
    (tmp_path / "suite.yaml").write_text(text.replace("layers:", "tuned: Tuning\n    layers:", 1))
    read = read_sweep(tmp_path / "suite.yaml")
    with_methods(read, "bp_dp,bp_single,bp_gpipe,mse,forward_first")
    found = {
        (run.method, run.stages): run.config
        for run in runs_of(read, folder=tmp_path, seeds=1)
        if run.method.startswith("bp")
    }
    pipelines = {(name, stages) for name in ("bp_1f1b", "bp_gpipe", "bp_dp") for stages in (1, 2)}
    assert set(found) == {("bp", 1), ("bp_single", 1), *pipelines}
    assert found["bp_single", 1] == found["bp", 1]
    assert found["bp_dp", 2]["associated_learning"]["method"] == "bp_dp"
    assert found["bp_dp", 2]["optimizer"]["params"]["lr"] == 0.5
    assert found["bp_gpipe", 2]["associated_learning"]["method"] == "bp_gpipe"
    assert found["bp_gpipe", 2]["optimizer"] == found["bp_1f1b", 2]["optimizer"] == found["bp", 1]["optimizer"]
    schedules = {c.config["associated_learning"]["method"] for c in runs_of(read, folder=tmp_path, seeds=1)}
    assert {"streaming", "forward_first"} <= schedules
    with pytest.raises(ALConfigError, match="unknown method 'nonsense'"):
        with_methods(read, "mse,nonsense")


def test_a_method_whose_name_holds_commas_is_selected(tmp_path: Path) -> None:
    """``recipe, mse`` was taken for two methods, of which no group has the first."""
    sweep(tmp_path, SUITE.replace("cold:", "mse, cold, bp:"))
    read = read_sweep(tmp_path / "suite.yaml")
    assert with_methods(read, "bp, mse, cold, bp,mse,mse, greedy") == ["bp", "mse, cold, bp", "mse", "mse", "greedy"]
    assert with_methods(read, "") == []


def test_a_cut_says_how_many_blocks_each_layer_holds(tmp_path: Path) -> None:
    found = sweep(tmp_path, SUITE.replace("    layers: [2, 4]", "    layers: [2, 4]\n    cuts: {2: [1, 3]}"))
    cuts = {(c.layers, str(c.config["experiment"]["model"]["al_options"]["num_layers"])) for c in found if c.layers}
    assert cuts == {(2, "[1, 3]"), (4, "4")}


def test_a_cells_key_changes_with_its_config_alone(tmp_path: Path) -> None:
    keys = [run.key for run in sweep(tmp_path)]
    assert keys == [run.key for run in sweep(tmp_path)]
    changed = [run.key for run in sweep(tmp_path, SUITE.replace("epochs: 2", "epochs: 3"))]
    assert not set(keys) & set(changed)


def test_a_key_is_set_for_all_runs(tmp_path: Path) -> None:
    sweep(tmp_path)
    read = read_sweep(tmp_path / "suite.yaml")
    found = list(runs_of(read, folder=tmp_path, seeds=1, assignments=["experiment.epochs=7"]))
    assert {run.config["experiment"]["epochs"] for run in found} == {7}


def test_the_same_work_is_done_once(tmp_path: Path) -> None:
    """``bp`` takes one process whatever P is, so it would come up for every P."""
    found = [(run.method, run.layers, run.stages, run.seed) for run in sweep(tmp_path)]
    assert len(found) == len(set(found))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("mse: {}", "msse: {}", ["unknown method 'msse'", "greedy"]),
        ("layers: [2, 4]", "layer: [2, 4]", ["layer", "layers"]),
        ("experiment.epochs: 2", "experiment.epoch: 2", ["epoch", "epochs"]),
        ("config: base.json", "config: gone.json", ["gone.json", "does not exist"]),
        ("name: tiny", "name: [", ["not valid YAML"]),
        ("layers: [2, 4]", "layers: [2]\n    cuts: {2: [1, 1, 2]}", ["[1, 1, 2] for K = 2", "expected 2 numbers"]),
    ],
)
def test_mistakes_are_named(tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    with pytest.raises(ALConfigError) as error:
        sweep(tmp_path, SUITE.replace(old, new))
    assert all(word in str(error.value) for word in words), error.value


def result(method: str, seed: int, accuracy: float, *, layers: int | None = None, **more: Any) -> dict[str, Any]:
    epochs = [{"epoch": e, "seconds": 2.0, "validation_accuracy": [0.4 * e]} for e in (1, 2)]
    return {
        "group": "Fashion, MLP", "suite_method": method, "K": layers, "P": 1, "seed": seed,
        "method": "bp_1f1b" if method == "bp" else "streaming", "test_accuracy": [0.1, accuracy],
        "validation_accuracy": [0.8], "history": epochs, "samples_per_second": 100.0,
        "peak_activation_bytes": [2**20, 2**21], "parameters": [10, 20],
        "date": f"2026-01-0{1 + seed} 00:00:00", "cores": 2, "cpu": "X", **more,
    }  # fmt: skip


def test_rows_have_mean_and_sample_deviation_over_seeds() -> None:
    table = rows([result("bp", 0, 0.80), result("bp", 1, 0.82), result("mse", 0, 0.70, layers=2)])
    twin, own = table
    assert (twin["method"], twin["seeds"], own["K"], own["seeds"]) == ("bp", 2, 2, 1)
    assert twin["test_accuracy"] == pytest.approx(0.81)
    assert twin["test_accuracy_sd"] == pytest.approx(0.0141421, abs=1e-6) and own["test_accuracy_sd"] is None
    assert (twin["peak_activation_bytes"], twin["parameters"], twin["seconds_per_epoch"]) == (2**21, 30, 2.0)
    text = document(*tables.sweep(table))
    assert "81.00 ± 1.41" in text and "| -11.00 |" in text
    assert twin["first_validation_accuracy"] == pytest.approx(0.4) and "| 40.00 |" in text


def test_a_suite_that_does_not_look_at_test_samples_has_a_table_all_the_same() -> None:
    """It once ended in a TypeError, after all of its runs."""
    (row,) = rows([{**result("bp", 0, 0.8), "test_accuracy": None}])
    assert row["test_accuracy"] is None and row["validation_accuracy"] == 0.8
    assert "| `bp` | - | - | - |" in document(*tables.sweep([row]))


def test_time_to_the_twin_is_that_until_its_last_validation_accuracy() -> None:
    slow = result("mse", 0, 0.7, layers=2)
    never = result("greedy", 0, 0.7, layers=2)
    never["history"] = [{"epoch": 1, "seconds": 2.0, "validation_accuracy": [0.1]}]
    table = rows([result("bp", 0, 0.8), slow, never])
    assert [row["seconds_to_twin"] for row in table] == [4.0, 4.0, None]
    assert "not reached" in document(*tables.sweep(table))


def test_times_of_another_machine_are_not_compared() -> None:
    """A group that was finished on a machine half as fast looked as if its methods took twice as long. Emulated times
    were drawn, and said to have never reached the twin's accuracy."""
    twins = [result("bp", seed, 0.8, boot="a" if seed == 0 else "b") for seed in (0, 1)]
    here = [result("greedy", seed, 0.7, layers=2, boot="a" if seed == 0 else "b") for seed in (0, 1)]
    there = [result("mse", seed, 0.7, layers=2, boot="b") for seed in (0, 1)]
    late = [result("bp_async", seed, 0.9, boot="b") | {"method": "bp_async"} for seed in (0, 1)]
    before = [result("contrast", seed, 0.7, layers=2) for seed in (0, 1)]  # of releases that did not record it
    results = [*twins, *here, *there, *late, *before]
    table = {row["method"]: row for row in rows(results)}
    shown = {name: (row["seconds_per_epoch"], row["seconds_to_twin"]) for name, row in table.items()}
    assert shown["bp"] == shown["greedy"] == (2.0, 4.0)
    assert shown["mse"] == shown["bp_async"] == shown["contrast"] == (None, None)
    assert "not reached" not in document(*tables.sweep(list(table.values())))
    assert twin_of(list(table.values())) is table["bp"], "late gradients are no back-propagation to compare with"
    assert {row["method"] for row in along(results) if row["by"] == "seconds"} == {"greedy"}
    assert {row["method"] for row in along(results) if row["by"] == "samples"} == {"greedy", "mse", "contrast"}


def test_the_twin_is_the_better_one_by_validation_accuracy() -> None:
    """A rate that one trial chose may fail with other seeds; test accuracies do not decide."""
    twins = [result("bp", seed, 0.6) | {"validation_accuracy": [0.6 - 0.1 * seed]} for seed in (0, 1)]
    lower = {"validation_accuracy": [0.59], "method": "bp_1f1b"}
    twins += [result("bp, lower", seed, 0.58) | lower for seed in (0, 1)]
    own = [result("greedy", seed, 0.59, layers=2) for seed in (0, 1)]
    table = rows([*twins, *own])
    assert twin_of(table)["method"] == "bp, lower"  # type: ignore[index]
    assert {each["suite_method"] for each in twins_of([*twins, *own]).values()} == {"bp, lower"}
    assert twin_of(rows([twins[0], *own]))["method"] == "bp", "of those that have run"  # type: ignore[index]


def test_failures_stay_in_the_table() -> None:
    failed = {"group": "Fashion, MLP", "suite_method": "mse", "K": 2, "P": 1, "seed": 0, "failure": "exit code 1"}
    table = rows([result("bp", 0, 0.8), failed])
    assert (table[1]["seeds"], table[1]["failed"], table[1]["test_accuracy"]) == (0, 1, None)
    assert "0, 1 failed" in document(*tables.sweep(table))


def test_a_group_is_drawn_with_its_spread_and_without_failures(tmp_path: Path) -> None:
    failed = {"group": "Fashion, MLP", "suite_method": "mse", "K": 2, "P": 1, "seed": 0, "failure": "exit code 1"}
    results = [result("bp", seed, 0.8 + seed / 100) for seed in (0, 1)]
    results += [result("greedy", seed, 0.7, layers=k, **EXITS) for seed in (0, 1) for k in (2, 4)]
    files = draw_group([*results, failed], tmp_path / "new" / "group.png")
    assert [file.name for file in files] == ["group.png", "group.svg"]
    assert "greedy, K = 4" in files[1].read_text() and "mse" not in files[1].read_text()
    assert draw_group([failed], tmp_path / "none.png") == []
    twin = [result for result in results if result["K"] is None]
    assert twin and draw_group(twin, tmp_path / "none.png") == [], "nothing to compare: panels without a point"


def test_a_method_is_drawn_by_its_name(tmp_path: Path) -> None:
    """Two dollar signs made a formula of what is between them, and an error of what is none."""
    results = [result("bp", 0, 0.8), result("adds $x_{2$", 0, 0.7, layers=2)]
    _, drawn = draw_group(results, tmp_path / "group.png")
    assert "adds $x_{2$, K = 2" in drawn.read_text()


def test_a_group_without_test_samples_is_drawn_by_its_validation_accuracy(tmp_path: Path) -> None:
    """It once ended in a TypeError, after all of its runs."""
    untested: dict[str, Any] = {"test_accuracy": None, "averaged_accuracy": None, "early_exit": []}
    results = [result("bp", 0, 0.8) | untested, result("greedy", 0, 0.7, layers=2) | untested]
    _, drawn = draw_group(results, tmp_path / "group.png")
    assert "validation accuracy, %" in drawn.read_text() and "at each exit" in drawn.read_text()
    blind = [{**each, "validation_accuracy": None} for each in results]
    assert draw_group(blind, tmp_path / "none.png") == [], "nothing to draw"


TRIALS = """
name: tiny
config: base.json
groups:
  - name: Fashion, MLP
    layers: [4]
    methods: {bp: {}, contrast: {}}
    trials:
      slow: {optimizer.params.lr: 0.001}
      quick: {optimizer.params.lr: 0.01}
    own_trials:
      contrast: {warm: {experiment.model.al_options.objective.temperature: 0.3}}
"""
TUNED = """
name: final
config: base.json
chosen: [chosen.json]
groups:
  - name: Fashion, for good
    tuned: Fashion, MLP
    layers: [2]
    methods: {bp: {}, contrast: {}, twice: {method: contrast, experiment.epochs: 9}, greedy: {}}
"""


def trial(method: str, name: str, validation: float, **more: Any) -> dict[str, Any]:
    layers = None if method == "bp" else 4
    known = {"validation_accuracy": [0.99, validation], "rho": 0.9}
    return result(method, 0, 0.0, layers=layers, trial=name, **{**known, **more})


def test_every_method_is_run_with_every_trial_and_its_own(tmp_path: Path) -> None:
    found = sweep(tmp_path, TRIALS, seeds=1)
    assert [(run.method, run.trial) for run in found] == [
        *[("bp", "slow"), ("bp", "quick")], *[("contrast", "slow"), ("contrast", "quick"), ("contrast", "warm")],
    ]  # fmt: skip
    assert [run.config["optimizer"]["params"]["lr"] for run in found] == [0.001, 0.01, 0.001, 0.01, 0.002]
    assert len({run.key for run in found}) == 5 and "(warm)" in found[-1].title


def test_the_best_validation_accuracy_of_the_last_exit_decides_and_test_accuracy_does_not(tmp_path: Path) -> None:
    sweep(tmp_path, TRIALS)
    tried = read_sweep(tmp_path / "suite.yaml")
    results = [
        trial("bp", "slow", 0.7, test_accuracy=[0.9]), trial("bp", "quick", 0.8, test_accuracy=[0.1]),
        trial("contrast", "slow", 0.6), trial("contrast", "quick", 0.5),
        trial("contrast", "warm", 0.65, averaged_validation_accuracy=[0.65, 0.75]),
    ]  # fmt: skip
    rows = choose(results, tried)
    assert [(row["method"], row["trial"], row["validation_accuracy"]) for row in rows] == [
        ("bp", "quick", 0.8), ("contrast", "warm", 0.65),
    ]  # fmt: skip
    assert rows[0]["keys"] == {"optimizer.params.lr": 0.01}
    assert rows[0]["rho"] == {"slow": None, "quick": None} and rows[1]["rho"]["warm"] == 0.9
    text = document(*tables.trials(rows))
    assert "| `contrast` | **warm** | **65.00** | 75.00 | 0.900 | 1 |" in text
    assert "| `bp` | slow | 70.00 | - | - | 1 |" in text


def test_trials_are_compared_on_the_seeds_that_all_of_them_have(tmp_path: Path) -> None:
    """A trial of which only the better seed had run was once ahead of those with both."""
    sweep(tmp_path, TRIALS)
    tried = read_sweep(tmp_path / "suite.yaml")
    slow, quick = trial("bp", "slow", 0.8), trial("bp", "quick", 0.7)
    (row,) = choose([slow, {**trial("bp", "slow", 0.4), "seed": 1}, quick], tried)
    assert (row["trial"], row["trials"], row["seeds"]) == ("slow", {"slow": 0.8, "quick": 0.7}, 1)
    assert choose([slow, {**quick, "seed": 1}], tried) == []


def test_a_method_with_an_unfinished_trial_is_not_chosen_for(tmp_path: Path) -> None:
    sweep(tmp_path, TRIALS)
    tried = read_sweep(tmp_path / "suite.yaml")
    failed = {"group": "Fashion, MLP", "suite_method": "bp", "trial": "quick", "failure": "exit code 1"}
    assert choose([trial("bp", "slow", 0.7), failed], tried) == []


def test_what_was_chosen_is_taken_over_by_a_group_that_asks_for_it(tmp_path: Path) -> None:
    rows = [
        {"group": "Fashion, MLP", "method": "bp", "keys": {"optimizer.params.lr": 0.01}},
        {"group": "Fashion, MLP", "method": "greedy", "keys": {}},
        {"group": "Fashion, MLP", "method": "contrast",
         "keys": {"experiment.model.al_options.objective.temperature": 0.3, "experiment.epochs": 5}},
    ]  # fmt: skip
    (tmp_path / "chosen.json").write_text(json.dumps({"rows": rows}))
    bp, contrast, twice, greedy = (run.config for run in sweep(tmp_path, TUNED, seeds=1))
    assert bp["optimizer"]["params"]["lr"] == 0.01 and greedy["optimizer"]["params"]["lr"] == 0.002
    for config, epochs in ((contrast, 5), (twice, 9)):  # keys of the sweep come last
        assert config["experiment"]["model"]["al_options"]["objective"]["temperature"] == 0.3
        assert config["experiment"]["epochs"] == epochs


def test_a_recipe_keeps_its_settings_under_the_name_of_an_objective(tmp_path: Path) -> None:
    """A row ``contrast: {method: ours}`` was trained with the learning rate that was chosen for ``contrast``."""
    rows = [{"group": "Fashion, MLP", "method": m, "keys": {"optimizer.params.lr": 0.5}} for m in ("bp", "contrast")]
    (tmp_path / "chosen.json").write_text(json.dumps({"rows": rows}))
    text = TUNED.replace("contrast: {}", "contrast: {method: ours}").replace(", greedy: {}", "")
    by_method = {run.method: run.config for run in sweep(tmp_path, text, seeds=1)}
    assert by_method["contrast"]["optimizer"] == RECIPES["ours"]["mlp"]["optimizer"]
    assert by_method["twice"]["optimizer"]["params"]["lr"] == 0.5


@pytest.mark.parametrize("chosen", [None, [], ["bp"]])
def test_a_group_waits_until_all_of_its_methods_are_chosen_for(tmp_path: Path, chosen: list[str] | None) -> None:
    if chosen is not None:
        rows = [{"group": "Fashion, MLP", "method": method, "keys": {}} for method in chosen]
        (tmp_path / "chosen.json").write_text(json.dumps({"rows": rows}))
    assert sweep(tmp_path, TUNED) == []
    assert waiting(read_sweep(tmp_path / "suite.yaml"), tmp_path) == ["Fashion, for good"]


def test_a_recipe_is_a_method_with_an_optimizer_of_its_own(tmp_path: Path) -> None:
    text = SUITE.replace("mse: {}", "ours: {}").replace(
        "cold: {method: contrast, experiment.model.al_options.objective.temperature: 0.01",
        "narrow: {method: ours, experiment.model.al_options.code_width: 8",
    )
    by_method = {run.method: run.config for run in sweep(tmp_path, text, seeds=1) if run.layers == 2}
    assert (
        by_method["ours"]["optimizer"]["type"] == "MuonAdamW" and by_method["contrast"]["optimizer"]["type"] == "AdamW"
    )
    assert by_method["narrow"]["experiment"]["model"]["al_options"] == {
        "num_layers": 2, "code_width": 8, "objective": RECIPES["ours"]["mlp"]["al_options"]["objective"],
    }  # fmt: skip


def test_many_methods_look_different() -> None:
    """The eighth looked like the first one."""
    assert len({tuple(method_look(number).values()) for number in range(40)}) == 40


EXITS: dict[str, Any] = {
    "exits": [{"exit": 1, "accuracy": 0.5, "cost": 0.25}, {"exit": 2, "accuracy": 0.7, "cost": 1.0}],
    "averaged": [{"averaged": 1, "accuracy": 0.7, "cost": 1.0}, {"averaged": 2, "accuracy": 0.8, "cost": 1.2}],
    "early_exit": [{"confidence": 0.9, "accuracy": 0.6, "cost": 0.5}],
}


def test_exits_are_told_with_their_cost_and_spread() -> None:
    better = {"exits": [{**row, "accuracy": row["accuracy"] + 0.02} for row in EXITS["exits"]]}
    found = exit_table([
        result("bp", 0, 0.8, exits=None), result("mse", 0, 0.7, layers=2, **EXITS),
        result("mse", 1, 0.7, layers=2, **{**EXITS, **better}),
    ])  # fmt: skip
    assert [(row["exit"], row["averaged"], row["confidence"], row["seeds"]) for row in found] == [
        (1, None, None, 2), (2, None, None, 2), (None, 1, None, 2), (None, 2, None, 2), (None, None, 0.9, 2),
    ]  # fmt: skip
    assert found[0]["accuracy"] == pytest.approx(0.51) and found[0]["accuracy_sd"] == pytest.approx(0.0141421, abs=1e-6)
    text = document(*tables.exits(found, "Fashion, MLP"))
    assert "| `mse` | 2 | 51.00 at 25 % | 71.00 at 100 % |" in text
    assert "mean of the last 2 |" in text and "mean of the last 1 |" not in text and "80.00 at 120 %" in text
    assert "confident to 0.9" in text and "| `mse` | 2 | 60.00 at 50 % |" in text
    assert tables.exits(found, "another") == []


def test_the_page_says_what_is_missing_and_compares_finished_rows_alone(tmp_path: Path) -> None:
    text = SUITE.replace("      bp_1f1b: {}\n", "").replace("stages: [1, 2]", "stages: [1]")
    every = sweep(tmp_path, text, seeds=2)
    results = [
        result("bp", 0, 0.80), result("bp", 1, 0.82), result("mse", 0, 0.71, layers=4),
        result("mse", 0, 0.70, layers=2, averaged_accuracy=[0.70, 0.80], **EXITS),
        result("mse", 1, 0.70, layers=2, averaged_accuracy=[0.70, 0.70], **EXITS),
    ]  # fmt: skip
    there = {(r["suite_method"], r["K"], r["seed"]) for r in results}
    about: dict[str, Any] = {
        "table": rows(results), "seeds": 2, "page": tmp_path / "docs" / "results.md",
        "header": {"command": "python run/compare.py", "date": "today", "versions": {"torch": "2"},
                   "machine": {"cores": 2, "cpu": "X"}},
    }  # fmt: skip
    page = results_page(
        every, [(run.method, run.layers, run.seed) in there for run in every], waits=["Fashion, CNN"],
        pictures={"Fashion, MLP": tmp_path / "docs" / "results" / "tiny-1.png"},
        groups_page=tmp_path / "docs" / "results_groups.md", **about,
    )  # fmt: skip
    whole = groups_page(results=results, exits=exit_table(results), curves=along(results), **about)
    assert "| Fashion, MLP | 81.00 | `mse` | -11.00 (-6.00) | - |" in page and "](results_groups.md)" in page
    assert (
        "| Fashion, MLP | 2 | 5 of 14 | `contrast` K = 2 (seed 0, 1); " in page and "; `mse` K = 4 (seed 1) |" in page
    )
    assert "| Fashion, CNN |  | 0 | all: its settings, or its epochs, are not chosen yet |" in page
    finished, unfinished = (next(line for line in whole.splitlines() if f"`mse` | {k} | 7" in line) for k in (2, 4))
    assert "| 75.00 ± 7.07 | -6.00 |" in finished  # of both exits together
    assert "| -11.00 |" in finished and "| - |" in unfinished and "-10" not in unfinished
    assert "Runs of 2026-01-01 to 2026-01-02, 2 cores (X)." in whole
    assert "](results/tiny-1.png)" in page and "60.00 at 50 %" in whole


def test_one_layer_stands_beside_several_where_a_group_has_it(tmp_path: Path) -> None:
    """Without K = 1 a page credits local training with what the losses and the head do."""
    every = sweep(tmp_path, SUITE.replace("stages: [1, 2]", "stages: [1]"), seeds=1)
    one = result("mse", 0, 0.85, layers=1, averaged_accuracy=[0.85])
    two = result("mse", 0, 0.86, layers=2, averaged_accuracy=[0.86, 0.87])

    def page(*results: dict[str, Any]) -> str:
        return results_page(
            every, [False for _ in every], waits=[], pictures={}, table=rows([result("bp", 0, 0.80), *results]),
            header={"command": "", "date": "", "versions": {}, "machine": {"cores": 2, "cpu": "X"}}, seeds=1,
            page=tmp_path / "results.md", groups_page=tmp_path / "results_groups.md",
        )  # fmt: skip

    assert "| `mse` | +5.00 | +6.00 (+7.00) |" in page(one, two) and "K = 1 is exact back-propagation" in page(one, two)
    assert "| `mse` | +6.00 (+7.00) |" in page(two) and "K = 1" not in page(two)


def test_the_suites_that_come_along_are_whole(tmp_path: Path) -> None:
    """Every trial, method and ablation of them is a config that its checks let through."""
    folder = Path(__file__).resolve().parents[2] / "ds_configs" / "suites"
    trials = {path.stem: read_sweep(path) for path in sorted(folder.glob("*.yaml"))}
    assert {"small", "paper", "tune_text", "tune_vision", "ablation"} <= trials.keys()
    for name in trials.keys() - {"small", "ablation", "long"}:  # those wait for what others choose
        assert list(runs_of(trials[name], folder=folder, seeds=1)) and not waiting(trials[name], folder), name
    for name in ("tune_text", "tune_vision"):
        found = list(runs_of(trials[name], folder=folder, seeds=1))
        for group in trials[name].groups:
            own = {
                method: {c.trial for c in found if (c.group, c.method) == (group.name, method)}
                for method in group.methods
            }
            count = {method: len(names) for method, names in own.items()}
            assert len(set(count.values())) == 1, f"{name}, {group.name}: unequal numbers of trials: {count}"
        assert not any(run.config["experiment"]["test"] for run in found)
    tuned = {group.name for name in ("tune_text", "tune_vision") for group in trials[name].groups}
    assert {group.tuned for group in trials["small"].groups} <= tuned
    rows = [
        {"group": group.name, "method": method, "keys": {}}
        for name in ("tune_text", "tune_vision") for group in trials[name].groups for method in group.methods
    ]  # fmt: skip
    (tmp_path / "chosen.json").write_text(json.dumps({"rows": rows}))
    for name in ("small", "ablation"):
        final = trials[name].model_copy(update={"chosen": [str(tmp_path / "chosen.json")]})
        found = list(runs_of(final, folder=folder, seeds=1))
        assert waiting(final, folder) == [] and {run.group for run in found} == {group.name for group in final.groups}
        if name == "ablation":
            assert len({run.key for run in found}) == len(found)
