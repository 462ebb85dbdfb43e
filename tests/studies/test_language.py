"""The study of language models: its corpus, how settings are chosen, what goes on after a stop, and the page."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ds_al.errors import ALDataError
from ds_al.launch.ranks import run_ranks
from ds_al.studies.language.corpus import END, bpe, load_corpus
from ds_al.studies.language.page import rows, write_tables
from ds_al.studies.language.plan import LIGHT, SAMPLED, SAMPLED_ALL, TWIN_SAMPLED, Method, Plan, choose, measured_runs
from ds_al.studies.language.speed import measure_speed, speed_of
from ds_al.studies.language.training import TWIN, Run, Sizes, pieces, train
from ds_al.studies.results import header, write
from ds_al.studies.runs import RunFile, run_missing
from tests.support.parquet_files import write_texts

PLAN = Plan(methods=(Method("readout"),), layers=(2,), seeds=2, steps=60, trial_steps=6, longer=0)


def corpus_of(folder: Path, **options: Any) -> Any:
    known = {"vocabulary": 300, "length": 16, "validation_fraction": 0.2, "cache_folder": str(folder / "cache")}
    return load_corpus("own", path=str(folder), **{**known, **options})


def test_pieces_hold_the_texts_one_after_the_other_and_are_kept(tmp_path: Path) -> None:
    write_texts(tmp_path, train=60, test=30)
    corpus = corpus_of(tmp_path)
    assert corpus.vocabulary <= 300 and corpus.train.shape[1] == 16
    (file,) = (tmp_path / "cache" / "ds_al").glob("bpe-*.json")
    tokenizer = bpe([], size=0, file=file)
    import pyarrow.parquet as pq

    texts = pq.read_table(tmp_path / "test.parquet")["text"].to_pylist()
    said = tokenizer.decode(corpus.test.flatten().tolist(), skip_special_tokens=False)
    assert "".join(text + END for text in texts).startswith(said) and len(said) > 100
    kept = np.load(next((tmp_path / "cache" / "ds_al").glob("*-train.npy")))
    assert np.array_equal(kept[: corpus.train.numel()], corpus.train.flatten().numpy())
    assert torch.equal(corpus_of(tmp_path).train, corpus.train), "the second time from the cache"
    with pytest.raises(ALDataError, match="expected 100000 or more"):
        corpus_of(tmp_path, length=100000)


def test_every_epoch_has_each_piece_once() -> None:
    part = torch.arange(12).view(6, 2)
    stream = pieces(part, size=2, seed=0)
    epochs = [[next(stream) for _ in range(3)] for _ in range(2)]
    for epoch in epochs:
        assert sorted(int(ids[0]) for (x, _), labels in epoch for ids in x) == [0, 2, 4, 6, 8, 10]
        assert all(torch.equal(x, labels) for (x, _), labels in epoch)
    assert not torch.equal(epochs[0][0][1], epochs[1][0][1])


def fake(run: Run) -> dict[str, Any]:
    """A result that a rate of 2e-3 and a private block make better."""
    loss = 4.0 + abs(run.lr - 2e-3) * 100 - 0.1 * run.bridge_blocks + 0.01 * run.seed
    loss += 0.2 if run.method != TWIN else 0
    if run.method != TWIN and run.budget == "operations":
        loss += 0.5
    exits = [loss] if run.method == TWIN else [loss + 1, loss]
    return {
        **asdict(run),
        "sizes": asdict(Sizes()),
        "vocabulary": 300,
        "tokens": run.steps * 512,
        "training_seconds": 1.0,
        "operations_per_token": 2e6 if run.method == TWIN else 3e6,
        "validation_loss": exits,
        "test_loss": exits,
    }


def read(folder: Path) -> list[dict[str, Any]]:
    return list(RunFile(folder / "lm.runs.jsonl").read().values())


def finish(folder: Path, run: Any = fake, plan: Plan = PLAN) -> list[str]:
    """Runs the plan; names of the runs that were there already."""
    known: list[str] = []
    file = RunFile(folder / "lm.runs.jsonl")
    run_missing(list(plan.trials()), file, run, done=lambda c, r, k: known.append(c.key) if k else None)
    for again in (False, True):
        runs = measured_runs(read(folder), plan)
        run_missing(runs, file, run, done=lambda c, r, k, again=again: known.append(c.key) if k and not again else None)
    return known


def test_settings_are_chosen_by_as_many_trials_for_each_and_the_rest_goes_on_after_a_stop(tmp_path: Path) -> None:
    trials = list(PLAN.trials())
    assert [len([t for t in trials if t.method == method]) for method in (TWIN, "readout")] == [5, 4]
    assert {t.seed for t in trials} == {0} and {t.budget for t in trials} == {"trial"}

    def stopped(run: Run) -> dict[str, Any]:
        if run.budget == "operations":
            raise KeyboardInterrupt
        return fake(run)

    with pytest.raises(KeyboardInterrupt):
        finish(tmp_path, stopped)
    known = finish(tmp_path)
    assert len(known) == 9 + 4 and not any(key.startswith("operations") for key in known)
    chosen = choose(read(tmp_path), PLAN)
    assert [(r["lr"], r["bridge_blocks"]) for r in chosen.values()] == [(2e-3, 0), (2e-3, 1)]
    steps = {(c.method, c.budget): c.steps for c in measured_runs(read(tmp_path), PLAN)}
    assert steps == {(TWIN, "tokens"): 60, ("readout", "tokens"): 60, ("readout", "operations"): 40}


def test_a_method_without_all_of_its_trials_is_not_chosen_and_failures_stay(tmp_path: Path) -> None:
    def failing(run: Run) -> dict[str, Any]:
        if run.method == "readout" and run.budget == "tokens" and run.seed == 1:
            raise RuntimeError("no memory")
        return fake(run)

    finish(tmp_path, failing)
    file = tmp_path / "lm.runs.jsonl"
    kept = [line for line in file.read_text().splitlines() if "trial_backprop_K1_H0_lr0.004" not in line]
    file.write_text("\n".join(kept) + "\n")
    assert list(choose(read(tmp_path), PLAN)) == [("readout", 2)]
    finish(tmp_path, failing)
    text = write_tables(read(tmp_path), PLAN, json_path=tmp_path / "out.json", page=tmp_path / "page.md")
    assert "RuntimeError: no memory" in text
    page = (tmp_path / "page.md").read_text()
    assert "* equal tokens: `readout`, K = 2: 1 of 2 seeds" in page and "2609.35440" in page
    finish(tmp_path)
    assert not any("failure" in result for result in read(tmp_path)), "a run that failed is repeated"


def test_the_gap_is_to_the_twin_of_the_same_seed(tmp_path: Path) -> None:
    finish(tmp_path / "runs")
    twin, readout, shorter = rows(read(tmp_path / "runs"), PLAN)
    assert twin["perplexity"] == pytest.approx((math.exp(4.0) + math.exp(4.01)) / 2)
    assert readout["ratio"] == pytest.approx(math.exp(0.1)) and len(readout["exits"]) == 2
    assert readout["gap"] == pytest.approx((math.exp(4.1) - math.exp(4) + math.exp(4.11) - math.exp(4.01)) / 2)
    assert shorter["budget"] == "operations" and shorter["ratio"] == pytest.approx(math.exp(0.6))
    text = write_tables(read(tmp_path / "runs"), PLAN, json_path=tmp_path / "out.json", page=tmp_path / "page.md")
    assert "### At equal operations" in text and "lr 0.002, H 1: 60.3" in text
    assert "Not run yet" not in (tmp_path / "page.md").read_text()
    assert len(json.loads((tmp_path / "out.json").read_text())["rows"]) == 3 and (tmp_path / "out.png").is_file()


def test_the_rate_that_is_better_over_all_seeds_counts(tmp_path: Path) -> None:
    """The twin's trial, of one seed, chose a rate that is worse on the two others."""
    finish(tmp_path)
    file = RunFile(tmp_path / "lm.runs.jsonl")
    other = [PLAN.run(TWIN, 1, seed, 1e-3, PLAN.steps, 0, budget="tokens") for seed in range(PLAN.seeds)]
    exits = {0: [5.0], 1: [2.9]}

    def run(run: Run) -> dict[str, Any]:
        return {**fake(run), "validation_loss": exits[run.seed], "test_loss": [2.0]}

    run_missing(other[:1], file, run, done=lambda *ran: None)
    assert choose(read(tmp_path), PLAN)[TWIN, 1]["lr"] == 2e-3, "not all seeds have run"
    run_missing(other[1:], file, run, done=lambda *ran: None)
    assert choose(read(tmp_path), PLAN)[TWIN, 1]["lr"] == 1e-3
    assert rows(read(tmp_path), PLAN)[0]["perplexity"] == pytest.approx(math.exp(2.0))
    missing = measured_runs(read(tmp_path), PLAN)
    assert {each.key for each in missing} <= {each["key"] for each in read(tmp_path)}, "nothing is left to run"


def test_longer_runs_are_compared_with_the_twin_that_is_trained_as_long(tmp_path: Path) -> None:
    plan = replace(PLAN, longer=3, in_longer=(TWIN, "readout"))

    def run(run: Run) -> dict[str, Any]:
        found = fake(run)
        if run.budget == "longer":
            found["validation_loss"] = [5.0 - 100 * run.lr]
            found["test_loss"] = [3.0] if run.method == TWIN else [3.5, 3.2]
        return found

    finish(tmp_path, run, plan)
    ran = {(r["method"], r["steps"], r["seed"], r["lr"]) for r in read(tmp_path) if r["budget"] == "longer"}
    assert ran == {
        (method, 3 * steps, seed, lr)
        for method, steps in ((TWIN, 60), ("readout", 40))
        for seed, lr in ((0, 2e-3), (0, 3e-3), (0, 4e-3), (1, 4e-3))
    }, "seed 0 chooses the rate of the longer runs"
    *_, twin, readout = rows(read(tmp_path), plan)
    assert (twin["budget"], readout["budget"]) == ("longer", "longer") and twin["gap"] == 0.0
    assert readout["ratio"] == pytest.approx(math.exp(0.2))
    page = tmp_path / "page.md"
    assert "At equal operations, longer" in write_tables(
        read(tmp_path), plan, json_path=tmp_path / "out.json", page=page
    )
    assert "Not run yet" not in page.read_text()


def test_the_page_says_first_how_the_same_loss_compares(tmp_path: Path) -> None:
    plan = replace(PLAN, methods=(SAMPLED_ALL, TWIN_SAMPLED), longer=2)

    def run(run: Run) -> dict[str, Any]:
        losses = {TWIN: 4.0, TWIN_SAMPLED.name: 3.9, SAMPLED_ALL.name: 4.1}
        return {**fake(run), "test_loss": [losses[run.method]] * run.layers}

    finish(tmp_path, run, plan)
    page = tmp_path / "page.md"
    write_tables(read(tmp_path), plan, json_path=tmp_path / "out.json", page=page)
    said = " ".join(page.read_text().split())
    for steps in (60, 120):
        assert f"of {steps} steps of back-propagation, `sampled_all` in K = 2 layers has 1.11 times its" in said
    assert said.count("and 1.22 times that of back-propagation with the same loss.") == 2
    file = tmp_path / "lm.runs.jsonl"
    kept = [line for line in file.read_text().splitlines() if '"operations_sampled_all' not in line]
    file.write_text("\n".join(kept) + "\n")
    write_tables(read(tmp_path), plan, json_path=tmp_path / "out.json", page=page)
    assert "operations of 60 steps" not in " ".join(page.read_text().split()), "it has not run"


def three_runs(folder: str) -> list[dict[str, Any]]:
    """Worker: the twin, the AL form of one layer, and one of two layers."""
    corpus = corpus_of(Path(folder))
    sizes = Sizes(blocks=2, width=16, heads=2, length=16, batch=4, held_out=6)
    runs = [
        Run(TWIN, 1, 0, 5e-3, 12),
        Run("next_token", 1, 0, 5e-3, 12),
        Run("token_codes", 2, 0, 5e-3, 12, bridge_blocks=1),
        Run("next_token", 2, 0, 5e-3, 12),
        *(Plan().run(each.name, each.layers[0] if each.layers else 2, 0, 5e-3, 12, 0, budget="tokens")
          for each in (LIGHT, SAMPLED, SAMPLED_ALL, TWIN_SAMPLED)),
    ]  # fmt: skip
    return [train(run, sizes, corpus, test=True) for run in runs]


def timed(folder: str) -> list[dict[str, Any]]:
    """Worker: times of a step of every method."""
    sizes = Sizes(blocks=2, width=16, heads=2, length=16, batch=4, held_out=6)
    plan = replace(PLAN, methods=(Method("readout"), TWIN_SAMPLED))
    return measure_speed(read(Path(folder)), plan, sizes, corpus_of(Path(folder)), repeat=3)


@pytest.mark.distributed
def test_a_step_of_each_method_takes_turns_with_one_of_the_twin(tmp_path: Path) -> None:
    write_texts(tmp_path, train=60, test=30)
    plan = replace(PLAN, methods=(Method("readout"), TWIN_SAMPLED))
    finish(tmp_path, plan=plan)
    page, path = tmp_path / "page.md", tmp_path / "out.json"
    write_tables(read(tmp_path), plan, json_path=path, page=page)
    assert "Not measured yet: `python run/perplexity.py --speed" in page.read_text()
    (table,) = run_ranks(f"{__name__}:timed", 1, folder=str(tmp_path))
    assert [(row["method"], row["K"], row["bridge_blocks"]) for row in table] == [
        ("backprop_sampled", 1, 0), ("readout", 2, 1)
    ]  # fmt: skip
    assert all(row["times_low"] <= row["times_as_long"] <= row["times_high"] for row in table)
    assert table[1]["times_operations"] == pytest.approx(1.5) and table[1]["twin_ms"] > 0
    write(speed_of(path), kind="perplexity_speed", header=header(), rows=table)
    write_tables(read(tmp_path), plan, json_path=path, page=page)
    assert "| `readout` | 2 | 1 |" in page.read_text().partition("## Time of a step")[2]


@pytest.mark.distributed
def test_one_al_layer_is_the_twin(tmp_path: Path) -> None:
    """Same weights, pieces, order and learning rates: what remains are the operations, which are the same, too."""
    write_texts(tmp_path, train=60, test=30)
    ((twin, one, codes, whole, light, *sampled),) = run_ranks(f"{__name__}:three_runs", 1, folder=str(tmp_path))
    assert one["test_loss"] == pytest.approx(twin["test_loss"], rel=1e-5)
    assert one["validation_loss"] == pytest.approx(twin["validation_loss"], rel=1e-5)
    assert one["operations_per_token"] == twin["operations_per_token"]
    assert twin["training_loss"][-1] < twin["training_loss"][0]
    head = 2 * 3 * corpus_of(tmp_path).vocabulary  # operations per token and number of a code, forward and backward
    assert whole["operations_per_token"] - light["operations_per_token"] == pytest.approx(
        head * (16 - 0.25 * 32) - 3 * 2 * 16 * (32 - 16), rel=0.1
    ), "the head of the first layer reads a quarter of the tokens"
    assert len(codes["test_loss"]) == 2 and codes["operations_per_token"] > twin["operations_per_token"]
    vocabulary = corpus_of(tmp_path).vocabulary
    part = max(math.ceil(0.25 * vocabulary), 4 * 15)
    labelled = 15 / 16  # the last of 16 tokens has no label
    less = 2 * 3 * (1 - part / vocabulary * labelled) * vocabulary * 16  # operations per token
    first, every, alone = (
        full["operations_per_token"] - each["operations_per_token"]
        for full, each in zip((whole, whole, twin), sampled, strict=True)
    )
    assert (first, every, alone) == pytest.approx((less, 2 * less, less), rel=0.01), "heads over a part of V"
