"""Comparability: a sentence for each difference, and silence where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ds_al.report import comparability, read
from tests.support.folders import make_run, make_seeds

OTHER_DATA = {"name": "mnist", "validation_fraction": 0.1, "augment": "flip", "eval_batch_size": 250}


def test_equal_runs_are_comparable(tmp_path: Path) -> None:
    make_seeds(tmp_path)
    assert comparability(read([tmp_path])[0]) == []
    assert comparability([]) == []


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"data": OTHER_DATA}, "Data set differs: fashion (1 run: streaming); mnist (1 run: bp_1f1b). Accuracies are"),
        ({"data": {**OTHER_DATA, "name": "fashion", "augment": "none"}}, "Preparation of the data differs"),
        ({"model": {"name": "mlp"}}, "Model differs"),
        ({"epochs": 5}, "Number of epochs differs: 3 (1 run: streaming); 5 (1 run: bp_1f1b)."),
        ({"cpu": "Intel"}, "Processor differs: AMD EPYC (1 run: streaming); Intel (1 run: bp_1f1b). Times are not"),
        ({"cpu": None}, "Processor is not recorded in all runs: AMD EPYC (1 run: streaming); not recorded (1 run"),
        ({"cores": 16}, "Number of cores differs"),
        ({"device": "cuda:0"}, "Device differs: cpu (1 run: streaming); cuda (1 run: bp_1f1b)."),
        ({"versions": {"torch": "2.9.0"}}, "Version of torch differs: 2.13.0 (1 run: streaming); 2.9.0"),
        ({"git_commit": "fff"}, "Code (git commit) differs"),
        ({"date": "2025-01-01 00:00:00"}, "Dates differ: the runs were made on 2 days, from 2025-01-01 to 2026-11-24."),
        ({"micro_batch_size": 10}, "Micro-batch size differs: 50 (1 run: streaming); 10 (1 run: bp_1f1b)."),
        ({"seed": 4}, "Seeds differ: streaming 0; bp_1f1b 4."),
        ({"test_samples": 100}, "Number of test samples differs"),
        ({"finished": False}, "Unfinished, and in no mean: vgg/20261124-100030."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_difference_has_its_sentence(tmp_path: Path, other: dict[str, Any], sentence: str) -> None:
    make_run(tmp_path)
    make_run(tmp_path, method="bp_1f1b", time="20261124-100030", **other)
    assert any(found.startswith(sentence) for found in comparability(read([tmp_path])[0]))


def test_a_stage_that_steps_after_every_micro_batch_learns_more_often_than_back_propagation(tmp_path: Path) -> None:
    make_run(tmp_path, config={"associated_learning": {"method": "streaming"}})
    make_run(tmp_path, method="bp_1f1b", time="20261124-100030")
    (sentence,) = comparability(read([tmp_path])[0])
    assert sentence.startswith("Optimizer steps per batch differs: 2 (1 run: streaming); 1 (1 run: bp_1f1b). Equal")


def test_seed_counts_and_repeated_seeds(tmp_path: Path) -> None:
    make_run(tmp_path, seed=0)
    make_run(tmp_path, seed=1)
    make_run(tmp_path, seed=1, time="20261124-110000")
    make_run(tmp_path, method="bp_1f1b")
    sentences = comparability(read([tmp_path])[0])
    assert sentences == [
        "Number of finished seeds differs: streaming 2; bp_1f1b 1. Means and spreads are not equally certain.",
        "A seed was run more than once: streaming. The spread is then not one over seeds alone.",
    ]


def test_settings_that_differ_within_a_cell(tmp_path: Path) -> None:
    make_run(tmp_path, seed=0)
    make_run(tmp_path, seed=1, config={"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}})
    assert comparability(read([tmp_path])[0]) == [
        "Settings differ within streaming: optimizer.params.lr (0.003, 0.1). Its mean mixes them."
    ]
