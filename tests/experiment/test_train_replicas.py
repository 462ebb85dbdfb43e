"""``run/train.py`` with data parallel replicas: of a pipeline (``--stages``), and of the whole twin (``bp_dp``).

More processes than stages once ended with an error, or, where layers were enough, were taken for more stages.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.experiment.test_train import CONFIG, layer_files, train

pytestmark = pytest.mark.distributed
MICRO_BATCHES = CONFIG["gradient_accumulation_steps"]


def trained(folder: Path, *args: str, processes: int) -> dict[str, Any]:
    """The summary of a run of one epoch, and its epoch's metrics."""
    folder.mkdir()
    out = folder / "out.json"
    result = train(
        folder, "--epochs", "1", "--json", str(out), *args, processes=processes, WANDB_MODE="disabled"
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:] + result.stdout[-3000:]
    (run,) = folder.glob("runs/tiny/*")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {**json.loads(out.read_text()), "rows": lines, "printed": result.stdout}


def test_two_replicas_of_two_stages_end_on_the_weights_of_one_process(tmp_path: Path) -> None:
    """One process takes two micro-batches before each step, which are those that the two replicas take."""
    four = trained(tmp_path / "four", "--stages", "2", "--trace", processes=4)
    twice = ("--set", f"gradient_accumulation_steps={2 * MICRO_BATCHES}")
    steps = ("--set", f"associated_learning.steps_per_batch={MICRO_BATCHES}")
    one = trained(tmp_path / "one", *twice, *steps, processes=1)
    weights, expected = layer_files(tmp_path / "four"), layer_files(tmp_path / "one")
    assert weights.keys() == expected.keys()
    for layer, state in expected.items():
        for name, value in state.items():
            assert torch.equal(value, weights[layer][name]), (layer, name)
    assert (four["stages"], four["copies"]) == (2, 2) and (one["stages"], one["copies"]) == (1, 1)
    for key in ("test_accuracy", "test_samples", "validation_accuracy"):
        assert four[key] == one[key], key
    batches = [[row["losses"] for row in run["rows"] if row["kind"] == "batch"] for run in (four, one)]
    assert len(batches[0]) == len(batches[1]) == 9000 // (50 * 2 * MICRO_BATCHES)
    assert torch.allclose(torch.tensor(batches[0]), torch.tensor(batches[1]), rtol=1e-4), "means over both replicas"
    assert len(four["idle"]) == len(four["bytes_sent"]) == len(four["parameters"]) == 2
    assert "2 stages, 2 replicas" in four["printed"]
    (run,) = (tmp_path / "four").glob("runs/tiny/*")
    assert (run / "timeline.png").exists() and (run / "trace/trace.json").exists()


@pytest.mark.slow
def test_replicas_of_the_twin_train_as_one_process_does(tmp_path: Path) -> None:
    """Two replicas share the micro-batches of a batch, so samples and steps are those of one process."""
    two = trained(tmp_path / "two", "--method", "bp_dp", processes=2)
    one = trained(tmp_path / "one", "--method", "bp_1f1b", processes=1)
    assert (two["stages"], two["copies"], two["method"]) == (1, 2, "bp_dp")
    assert two["test_accuracy"] == pytest.approx(one["test_accuracy"], abs=0.01) and two["test_samples"] == 2000
    losses = [next(row["loss"] for row in run["rows"] if row["kind"] == "epoch") for run in (two, one)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert two["parameters"] == one["parameters"] and two["bytes_sent"] == [0]


def test_replicas_that_cannot_share_a_batch_are_refused(tmp_path: Path) -> None:
    result = train(
        tmp_path, "--method", "bp_dp", "--set", "gradient_accumulation_steps=3", WANDB_MODE="disabled"
    )  # fmt: skip
    assert result.returncode != 0
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "got 3 for 2 replicas of bp_dp" in error


@pytest.mark.slow
def test_replicas_of_the_twins_pipeline_train_and_resume(tmp_path: Path) -> None:
    four = trained(tmp_path / "four", "--method", "bp_1f1b", "--stages", "2", processes=4)
    assert (four["stages"], four["copies"]) == (2, 2) and four["test_accuracy"][-1] > 0.4
    (run,) = (tmp_path / "four").glob("runs/tiny/*")
    resumed = trained(
        tmp_path / "on", "--method", "bp_1f1b", "--stages", "2", "--epochs", "2", "--resume", f"{run}/checkpoints",
        processes=4,
    )  # fmt: skip
    assert [row["epoch"] for row in resumed["rows"] if row["kind"] == "epoch"] == [2]
