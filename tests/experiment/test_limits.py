"""A run ends by its stopping rule, alike for AL and back-propagation, on every rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 50,
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 0.0,
    "steps_per_print": None,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.002, "torch_adam": True}},
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": {"total_num_steps": "auto", "warmup_num_steps": 2, "cos_min_ratio": 0.0},
    },
    "experiment": {
        "name": "tiny", "model": {"name": "mlp"}, "data": {"name": "fashion-mnist-small"}, "epochs": 3,
        "evaluate_every": 3, "wandb": {"enabled": False},
    },
}  # fmt: skip


def train(config: dict[str, Any]) -> dict[str, Any]:
    from ds_al.experiment.job import Job

    job = Job(config)
    summary = job.run()
    job.close()
    return summary


@pytest.mark.parametrize(
    ("rule", "epochs", "batches", "method"),
    [
        ({"max_batches": 50}, 2, 50, "streaming"),
        ({"max_seconds": 1e-3}, 1, 45, "bp_1f1b"),
        pytest.param({"max_batches": 50}, 2, 50, "bp_1f1b", marks=pytest.mark.slow),
        pytest.param({"max_seconds": 1e-3}, 1, 45, "streaming", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_all_ranks_stop_and_look_at_the_test_samples(
    rule: dict[str, float], epochs: int, batches: int, method: str, tmp_path: Path
) -> None:
    experiment = {**CONFIG["experiment"], **rule, "output": str(tmp_path)}
    config = {**CONFIG, "associated_learning": {"method": method}, "experiment": experiment}
    first, last = run_ranks(f"{__name__}:train", 2, config=config)
    assert first["epochs"] == last["epochs"] == epochs
    assert first["test_accuracy"] == last["test_accuracy"] and first["test_accuracy"][-1] > 0.4
    (metrics,) = tmp_path.glob("tiny/*/metrics.jsonl")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    by_epoch = [row for row in rows if row["kind"] == "epoch"]
    assert ["validation_accuracy" in row for row in by_epoch] == [False] * (epochs - 1) + [True]
    if method == "streaming":
        assert len([row for row in rows if row["kind"] == "batch"]) == batches
    if "max_batches" in rule:
        assert by_epoch[-1]["learning_rate"] == pytest.approx(0.0, abs=1e-5), "the schedule ends with the run"
    else:
        assert by_epoch[-1]["learning_rate"] > 1e-3
