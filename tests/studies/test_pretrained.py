"""The study of fine-tuning: how rates are chosen, what goes on after a stop, the page, and a run at a tiny size."""

from __future__ import annotations

import contextlib
import json
import runpy
import sys
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from ds_al.errors import ALConfigError
from ds_al.launch.ranks import run_ranks
from ds_al.studies.pretrained.page import rows, write_tables
from ds_al.studies.pretrained.plan import Plan
from ds_al.studies.pretrained.speed import time_on_rank
from ds_al.studies.pretrained.texts import load_texts
from ds_al.studies.pretrained.training import TWIN, Run, Settings, check_peft, train
from ds_al.studies.results import read
from ds_al.studies.runs import RunFile, run_missing
from ds_al.studies.tables import pretrained as tables
from tests.support.hugging_face_models import CASES
from tests.support.parquet_files import write_texts

SETTINGS = Settings(batch=4, new_first=8, held_out=8, tested=8)
PLAN = Plan(
    data=("imdb",), methods=("greedy", "mse"), adapt=("all", "frozen"), layers=(2, 4), seeds=2, samples=16,
    trial_samples=8, rates=(1e-3, 1e-2), settings=SETTINGS,
)  # fmt: skip


def fake(run: Run) -> dict[str, Any]:
    """A result that a rate of 1e-2 makes better, and local learning worse."""
    accuracy = 0.8 + run.lr - 0.1 * (run.method != TWIN) + 0.01 * run.seed
    exits = [accuracy - 0.1 * k for k in reversed(range(run.layers))]
    return {
        **asdict(run), "settings": asdict(SETTINGS), "training_seconds": 1.0, "cpu_seconds": 1.6, "weights": 100,
        "trained_weights": 40, "early_accuracy": None, "validation_accuracy": exits, "test_accuracy": exits,
    }  # fmt: skip


def finish(folder: Path, run: Any = fake, until: float = float("inf")) -> tuple[list[str], list[dict[str, Any]]]:
    """Runs the plan; names of the runs that were there already, and all results."""
    file, known = RunFile(folder / "tuned.runs.jsonl"), []
    for part in (lambda: list(PLAN.trials()), lambda: PLAN.runs(file.read().values())):
        run_missing(part(), file, run, done=lambda r, _, there: known.append(r.key) if there else None, until=until)
    return known, list(file.read().values())


def test_rates_are_chosen_for_each_form_and_a_stopped_study_goes_on(tmp_path: Path) -> None:
    assert [form[1:] for form in PLAN.forms()] == [
        (TWIN, "all"), ("greedy", "all"), ("mse", "all"), (TWIN, "frozen"), ("greedy", "frozen"),
        ("greedy-by-work", "frozen"),
    ]  # fmt: skip

    def stopped(run: Run) -> dict[str, Any]:
        if run.budget == "run" and run.layers == 4:
            raise KeyboardInterrupt
        return fake(run)

    assert finish(tmp_path, until=0.0) == ([], []), "no time, no run"
    with pytest.raises(KeyboardInterrupt):
        finish(tmp_path, stopped)
    known, results = finish(tmp_path)
    assert len(known) == 12 + 2 and set(PLAN.chosen(results).values()) == {1e-2}
    assert len(results) == 12 + 2 * (2 * 1 + 3 * 2 + 1)


def test_adapters_have_rates_of_their_own() -> None:
    """At each rate of the pretrained weights they stayed at what the classifier alone reaches."""
    plan = replace(PLAN, adapt=("frozen", "lora"), adapter_rates=(0.1, 0.2, 0.3))
    rates: dict[tuple[str, str], list[float]] = defaultdict(list)
    for run in plan.trials():
        rates[run.method, run.adapt].append(run.lr)
    assert rates[TWIN, "lora"] == rates["greedy", "lora"] == [0.1, 0.2, 0.3]
    assert rates[TWIN, "frozen"] == rates["greedy", "frozen"] == [1e-3, 1e-2]


def test_a_run_that_failed_is_repeated(tmp_path: Path) -> None:
    def failing(run: Run) -> dict[str, Any]:
        if run.method == "mse":
            raise RuntimeError("no memory")
        return fake(run)

    _, results = finish(tmp_path, failing)
    assert sum("failure" in result for result in results) == 2 and ("imdb", "mse", "all") not in PLAN.chosen(results)
    text = write_tables(results, PLAN, json_path=tmp_path / "tuned.json", page=tmp_path / "page.md")
    assert "RuntimeError: no memory" in text
    page = (tmp_path / "page.md").read_text()
    assert "| imdb | all | 2 | 2, 2 | 0, 0 |  |" in page and "| imdb | frozen | 2 | 2, 2 |  | 2 |" in page
    assert not any("failure" in result for result in finish(tmp_path)[1])


def test_the_gap_is_to_back_propagation_of_the_same_seed_and_weights(tmp_path: Path) -> None:
    _, results = finish(tmp_path)
    table = {(row["method"], row["adapt"], row["K"]): row for row in rows(results, PLAN)}
    assert table["greedy", "frozen", 2]["gap"] == pytest.approx(-0.1) and table[TWIN, "all", 1]["gap"] is None
    assert len(table["mse", "all", 4]["exits"]) == 4 and table["mse", "all", 4]["cpu_ms"] == pytest.approx(100)
    write_tables(results, PLAN, json_path=tmp_path / "tuned.json", page=tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    text = " ".join(page.split())
    assert "**Local learning keeps up with back-propagation in 0 of 2 cases**" in text, "K = 2, two objectives"
    assert "in 0 of 2 cases, where the lower half of the blocks is frozen in both**" in text, "a verdict of its own"
    assert "-10.0 points beside back-propagation (2 seeds)" in text and "## Not run yet" not in page
    assert len(json.loads((tmp_path / "tuned.json").read_text())["rows"]) == 9


def test_the_gap_is_to_the_better_rate_of_back_propagation(tmp_path: Path) -> None:
    """At the rate that one trial chose, a run with another seed stayed at chance."""

    def failing(run: Run) -> dict[str, Any]:
        result = fake(run)
        if run.method == TWIN and run.budget == "run" and run.lr == 1e-2 and run.seed == 1:
            result["validation_accuracy"] = result["test_accuracy"] = [0.5]
        return result

    _, results = finish(tmp_path, failing)
    twins = [{**fake(run), "key": run.key} for run in PLAN.at([1e-3])]
    twins = [twin for twin in twins if (twin["method"], twin["adapt"]) == (TWIN, "all")]
    table = rows([*results, *twins[:1]], PLAN)
    assert next(row["gap"] for row in table if row["method"] == "greedy") == pytest.approx((-0.1 + 0.22) / 2), "1 seed"
    table = rows([*results, *twins], PLAN)
    assert next(row["gap"] for row in table if row["method"] == "greedy") == pytest.approx(-0.1 + 0.009)
    both = [
        (row["lr"], row["accuracy"], row["best"]) for row in table if (row["method"], row["adapt"]) == (TWIN, "all")
    ]
    assert both == [(1e-3, pytest.approx(0.806), True), (1e-2, pytest.approx((0.81 + 0.5) / 2), False)]


def test_processor_times_of_different_machines_are_not_shown(tmp_path: Path) -> None:
    """A study that went on another day, on a slower machine, showed both times in one column."""

    def elsewhere(run: Run) -> dict[str, Any]:
        return {**fake(run), "boot": "b" if run.method == "mse" else "a"}

    _, results = finish(tmp_path, elsewhere)
    shown = {row["method"]: row["cpu_ms"] for row in rows(results, PLAN) if row["adapt"] == "all"}
    assert shown == {TWIN: pytest.approx(100), "greedy": pytest.approx(100), "mse": None}
    text = write_tables(results, PLAN, json_path=tmp_path / "tuned.json", page=tmp_path / "page.md")
    assert text.count("100 ms") == 7 and next(line for line in text.splitlines() if "`mse`" in line).endswith("|  |")


def test_the_exit_with_the_best_validation_accuracy_is_compared_too(tmp_path: Path) -> None:
    """The last exit may be the worse one; which one to use is chosen without test texts."""

    def early(run: Run) -> dict[str, Any]:
        result = fake(run)
        if run.method == "mse":
            result["validation_accuracy"] = [0.5, 0.6, 0.6, 0.1][: run.layers]
            result["test_accuracy"] = [0.9, 0.8 + 0.01 * run.seed, 0.99, 0.2][: run.layers]
        return result

    _, results = finish(tmp_path, early)
    table = {(row["method"], row["adapt"], row["K"]): row for row in rows(results, PLAN)}
    row = table["mse", "all", 4]
    assert row["accuracy"] == 0.2 and row["chosen"] == pytest.approx(0.805)
    assert row["chosen_gap"] == pytest.approx(-0.01) and table[TWIN, "all", 1]["chosen_gap"] is None
    text = write_tables(results, PLAN, json_path=tmp_path / "tuned.json", page=tmp_path / "page.md")
    assert sum("| 80.50 (-1.00) |" in line for line in text.splitlines()) == 2, "K = 2 and 4"


def test_the_mean_of_all_exits_is_shown_where_all_runs_have_it(tmp_path: Path) -> None:
    def some(run: Run) -> dict[str, Any]:
        known = run.method == "mse" or (run.method == "greedy" and run.seed == 0)
        return {**fake(run), **({"averaged_test_accuracy": 0.7525} if known else {})}

    _, results = finish(tmp_path, some)
    shown = {row["method"]: row["averaged"] for row in rows(results, PLAN) if row["adapt"] == "all"}
    assert shown == {TWIN: None, "greedy": None, "mse": pytest.approx(0.7525)}
    text = write_tables(results, PLAN, json_path=tmp_path / "tuned.json", page=tmp_path / "page.md")
    lines = [line for line in text.splitlines() if "| 75.2 |" in line]
    assert len(lines) == 2 and all(line.startswith("| `mse` |") for line in lines), "K = 2 and 4"


def test_a_head_on_the_mean_has_tables_of_its_own_and_a_twin_with_the_same_head(tmp_path: Path) -> None:
    file, mean = RunFile(tmp_path / "tuned.runs.jsonl"), replace(PLAN, pooling="mean")

    def better(run: Run) -> dict[str, Any]:
        result, more = fake(run), (0.1 if run.method == TWIN else 0.05) * (run.pooling == "mean")
        return {**result, "test_accuracy": [value + more for value in result["test_accuracy"]]}

    finish(tmp_path, better)
    for part in (lambda: list(mean.trials()), lambda: mean.runs(file.read().values())):
        run_missing(part(), file, better, done=lambda *_: None)
    results = list(file.read().values())
    assert len(results) == 2 * (12 + 18) and len({result["key"] for result in results}) == len(results)
    for plan, gap in ((PLAN, -0.1), (mean, -0.15)):
        table = {(row["method"], row["adapt"], row["K"]): row for row in rows(results, plan)}
        assert table["mse", "all", 2]["gap"] == pytest.approx(gap) and table["mse", "all", 2]["seeds"] == 2
    write_tables(results, PLAN, json_path=tmp_path / "tuned.json", page=tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    text = " ".join(page.split())
    assert "in 0 of 2 cases, if the head reads the mean over the tokens in both**" in text
    assert page.count("| `mse` | all (40.0 %) | 2 |") == 2 and page.count("; the head reads the mean\n") == 1
    assert "| imdb | `mse` | all | a token |" in page and "| imdb | `mse` | all | mean |" in page
    assert "## Not run yet" not in page
    rows_ = json.loads((tmp_path / "tuned.json").read_text())["rows"]
    assert [row["pooling"] for row in rows_] == [None] * 9 + ["mean"] * 9


def test_times_of_two_stages_leave_the_accuracies_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of accuracies was written again, with the command of the times."""
    times = iter(range(9))

    def measured(*args: Any, data: str, adapt: list[str], **options: Any) -> list[dict[str, Any]]:
        return [{"data": data, "adapt": each, "held_bytes": next(times)} for each in adapt]

    monkeypatch.setattr("ds_al.studies.pretrained.speed.measure_speed", measured)
    finish(tmp_path)

    def run(*more: str) -> list[tuple[str, int]]:
        what = ["--data", "imdb", "--methods", "greedy", "--samples", "16", "--trial-samples", "8", *more]
        command = ["finetune", "--pretrained", str(tmp_path), *what, "--speed", "--json", str(tmp_path / "tuned.json")]
        monkeypatch.setattr(sys, "argv", command)
        with contextlib.suppress(SystemExit):
            runpy.run_path("run/finetune.py", run_name="__main__")
        assert [path.name for path in sorted(tmp_path.glob("*.json"))] == ["tuned_speed.json"]
        return [(row["adapt"], row["held_bytes"]) for row in read(tmp_path / "tuned_speed.json").rows]

    assert run("--adapt", "all,frozen") == [("all", 0), ("frozen", 1)]
    assert run("--adapt", "frozen") == [("all", 0), ("frozen", 2)], "what is not measured again stays"
    assert run("--adapt", "frozen", "--repeat", "3") == [("frozen", 3)], "of other settings"


@pytest.mark.parametrize(("more", "pooling"), [([], None), (["--classifier-pooling", "mean"], "mean")])
def test_the_command_says_what_the_head_reads(
    tmp_path: Path, more: list[str], pooling: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = list[str | None]()

    def trials(plan: Plan) -> list[Run]:
        planned.append(plan.pooling)
        return []

    monkeypatch.setattr("ds_al.studies.pretrained.texts.load_texts", lambda *args, **options: None)
    monkeypatch.setattr("ds_al.launch.ranks.rank_environment", lambda *args: {})
    monkeypatch.setattr(Plan, "trials", trials)
    monkeypatch.setattr(Plan, "chosen", lambda self, results: {})
    what = ["--adapt", "all", "--data", "imdb", "--pretrained", str(tmp_path), "--json", str(tmp_path / "tuned.json")]
    monkeypatch.setattr(sys, "argv", ["finetune", *what, *more])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path("run/finetune.py", run_name="__main__")
    assert planned[0] == pooling, "those that run; the tables ask for both"


@pytest.mark.parametrize("script", ["finetune", "perplexity"])
@pytest.mark.parametrize("more", [["--page", "page.md"], ["--table-only"]])
def test_a_measurement_of_times_that_would_drop_a_wish_is_refused(
    script: str, more: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--speed", "--json", "out.json", *more])
    with pytest.raises(SystemExit, match="leave out --page and --table-only"):
        runpy.run_path(f"run/{script}.py", run_name="__main__")


def test_without_results_the_page_says_so(tmp_path: Path) -> None:
    write_tables([], Plan(), json_path=tmp_path / "tuned.json", page=tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "**Not run yet.** There is no result" in page and "| ag-news | all | 0 | 0, 0, 0 |" in page


def pretrained_folder(folder: Path) -> Path:
    """A tiny BERT with the words that the texts have."""
    from transformers import BertTokenizer

    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    words += [f"##{letter}" for letter in words[5:]]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    options = {"pad_token_id": 0, "max_position_embeddings": 128, "hidden_dropout_prob": 0.0}
    options |= {"vocab_size": len(words), "attention_probs_dropout_prob": 0.0}
    CASES["bert"].build(**options).bert.save_pretrained(folder)
    return folder


def some_runs(folder: str, adapt: str, pooling: str | None) -> list[Any]:
    """Worker: back-propagation, and local learning of one layer and of two."""
    pretrained = Path(folder) / "bert"
    texts = load_texts("imdb", root=Path(folder), pretrained=pretrained, cache=f"{folder}/cache")
    found = []
    for method, layers in ((TWIN, 1), ("greedy", 1), ("contrast", 2)):
        run = Run("imdb", method, adapt, layers, 0, 1e-3, 16, "run", pooling)  # type: ignore[arg-type]
        found.append(train(run, SETTINGS, texts, pretrained=pretrained))
    return found


@pytest.mark.distributed
@pytest.mark.parametrize(("adapt", "pooling"), [("all", None), ("all", "mean"), ("frozen", None), ("lora", None)])
def test_one_layer_learns_as_back_propagation_does(tmp_path: Path, adapt: str, pooling: str | None) -> None:
    if adapt == "lora":
        pytest.importorskip("peft")
    write_texts(tmp_path / "imdb-small", train=40, test=20)
    pretrained_folder(tmp_path / "bert")
    ((twin, one, two),) = run_ranks(f"{__name__}:some_runs", 1, folder=str(tmp_path), adapt=adapt, pooling=pooling)
    for name in ("weights", "trained_weights", "validation_accuracy", "test_accuracy"):
        assert twin[name] == one[name], name
    assert (twin["trained_weights"] == twin["weights"]) == (adapt == "all")
    assert len(two["test_accuracy"]) == 2 and two["cpu_seconds"] > 0
    assert twin["averaged_test_accuracy"] is None and one["averaged_test_accuracy"] == one["test_accuracy"][0]
    assert 0 <= two["averaged_validation_accuracy"] <= 1


def on_two_stages(folder: str) -> Any:
    """Worker: times and memory of both methods."""
    cases = [("bp_1f1b", "all"), ("greedy", "all"), ("greedy", "frozen"), ("bp_1f1b", "frozen"), ("bp_zb_h2", "frozen")]
    cases.append(("greedy-by-work", "frozen"))
    return time_on_rank(cases, folder, "imdb", replace(SETTINGS, new_first=0), 2, 1, 1)  # type: ignore[arg-type]


@pytest.mark.distributed
def test_two_stages_are_timed_and_their_memory_is_counted(tmp_path: Path) -> None:
    ranks = run_ranks(f"{__name__}:on_two_stages", 2, folder=str(pretrained_folder(tmp_path / "bert")))
    for stage, (twin, whole, *rest) in enumerate(ranks):
        frozen, half, split, by_work = rest
        assert [row["stage"] for row in (twin, whole, *rest)] == [stage] * 6
        by_stage = [by_work["training_bytes"], frozen["training_bytes"]]
        assert by_stage == sorted(by_stage, reverse=stage == 0) and len(set(by_stage)) == 2, "blocks that train move"
        assert all(row["held_bytes"] > 0 and row["samples_per_second_low"] > 0 for row in (twin, whole))
        assert whole["samples_per_second_low"] <= whole["samples_per_second"] <= whole["samples_per_second_high"]
        assert whole["training_bytes"] == 3 * whole["weight_bytes"]
        blocks = {row["method"]: row["weight_bytes"] for row in (twin, whole)}
        assert half["training_bytes"] == split["training_bytes"] > 0, (
            "1F1B once had all frozen blocks on a stage, which DeepSpeed cannot train"
        )
        assert 0.5 < blocks["bp_1f1b"] / blocks["greedy"] < 1.5, "the last stage of 1F1B once had the head alone"
    assert ranks[0][2]["held_bytes"] < ranks[0][1]["held_bytes"], "no backward runs through blocks that are frozen"
    assert ranks[0][2]["training_bytes"] < ranks[0][1]["training_bytes"] / 4


def test_speeds_are_beside_1f1b_and_beside_the_fastest_exact_schedule() -> None:
    """Beside 1F1B alone, a pipeline that zero bubble beats would look fast."""
    speeds = {"bp_1f1b": 10.0, "bp_zb_h1": 16.0, "bp_zb_h2": 20.0, "greedy": 15.0}
    sizes = {"stage": 0, "micro_batches": 8, "weight_bytes": 1, "training_bytes": 1, "held_bytes": 1}
    rows_ = [
        {
            "data": "imdb",
            "adapt": adapt,
            "method": method,
            "samples_per_second": factor * speed,
            **sizes,
            "samples_per_second_low": 0.0,
            "samples_per_second_high": 99.0,
        }
        for adapt, factor in (("all", 1.0), ("frozen", 3.0))
        for method, speed in speeds.items()
    ]
    table = tables.speed(rows_)
    at = [table.columns.index(name) for name in ("method", "times 1F1B", "times the fastest exact")]
    shown = [tuple(row[i] for i in at) for row in table.rows]
    assert shown == 2 * [*((f"`{name}`", "", "") for name in list(speeds)[:3]), ("`greedy`, K = 2", "1.50", "0.75")]


def test_adapters_without_peft_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ALConfigError, match="pip install peft, or leave them out: --adapt all,frozen"):
        check_peft()
