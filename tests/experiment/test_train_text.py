"""``run/train.py`` on texts: shapes that vary, words of the training part, the same data for AL and its twin."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from tests.experiment.test_train import CONFIG, train
from tests.support.parquet_files import write_texts
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed


def text_config(model: str, padding: str, **data: Any) -> dict[str, Any]:
    """Two micro-batches of 9 texts per batch."""
    config = copy.deepcopy(CONFIG)
    options = {"lstm": {"embedding_width": 16, "width": 16}, "transformer": {"width": 16, "heads": 2}}[model]
    config |= {"train_micro_batch_size_per_gpu": 9, "gradient_accumulation_steps": 2}
    config["optimizer"]["params"]["lr"] = 0.01
    config["experiment"] |= {
        "model": {"name": model, "options": {"num_layers": 2, "dropout": 0.0, **options}},
        "data": {"name": "own", "max_length": 24, "padding": padding, **data},
        "epochs": 1,
    }
    return config


@pytest.mark.parametrize(
    ("model", "padding", "method"),
    [
        ("transformer", "longest", "streaming"),
        ("transformer", "bucket", "bp_1f1b"),
        ("lstm", "bucket", "streaming"),
        pytest.param("lstm", "max_length", "bp_1f1b", marks=pytest.mark.slow),
    ],
)
def test_an_epoch_of_texts_on_two_stages(tmp_path: Path, model: str, padding: str, method: str) -> None:
    texts = write_texts(tmp_path / "texts", train=600, test=60)
    config = text_config(model, padding, cache=str(tmp_path / "cache"))
    out = tmp_path / "out.json"
    result = train(
        tmp_path,
        *("--data-path", str(texts), "--text-column", "text", "--label-column", "label"),
        *("--method", method, "--json", str(out)),
        config=config,
        WANDB_MODE="disabled",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    summary = json.loads(out.read_text())
    assert summary["test_samples"] == 60 and summary["test_accuracy"][-1] > 0.6  # a third by chance
    assert summary["wait_data_seconds"] >= 0
    (run,) = tmp_path.glob("runs/tiny/*")
    resolved = json.loads((run / "summary.json").read_text())
    assert resolved["rho"] is not None and resolved["data"]["path"] == str(texts)
    vocabulary = json.loads((run / "vocabulary.json").read_text())
    assert vocabulary[:2] == ["<pad>", "<unk>"] and not [word for word in vocabulary if word.startswith("test")]


def first_batches(config: dict[str, Any], method: str) -> dict[str, Any]:
    """Worker: the first micro-batches of a run, on the ranks that read data, and the shapes its engine expects."""
    from ds_al.experiment.job import Job

    job = Job({**config, "associated_learning": {"method": method}})
    batches = []
    if job.loader is not None:
        batches = [(ids.tolist(), y.tolist()) for (ids, _), y in (next(job.loader) for _ in range(8))]
    job.close()
    return {"batches": batches, "dynamic": job.engine.dynamic_shape}


@pytest.mark.parametrize(("padding", "dynamic"), [("bucket", True), ("max_length", False)])
def test_al_and_its_twin_read_the_same_micro_batches(tmp_path: Path, padding: str, dynamic: bool) -> None:
    texts = write_texts(tmp_path / "texts")
    config = text_config("transformer", padding, cache=str(tmp_path / "cache"), path=str(texts))
    (first, last), (twin_first, twin_last) = (
        run_ranks(f"{__name__}:first_batches", 2, config=config, method=method) for method in ("streaming", "bp_1f1b")
    )
    assert first["batches"] == twin_first["batches"] == twin_last["batches"]
    assert len(first["batches"]) == 8 and last["batches"] == []
    assert {found["dynamic"] for found in (first, last, twin_first, twin_last)} == {dynamic}


def test_a_model_of_images_is_refused_for_text_and_names_those_that_read_it(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts")
    config = text_config("transformer", "longest", cache=str(tmp_path / "cache"))
    config["experiment"]["model"] = {"name": "vgg"}
    result = train(tmp_path, "--data-path", str(texts), config=config, processes=1, WANDB_MODE="disabled")
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.returncode != 0
    assert "model 'vgg' does not read text" in error and "'lstm', 'transformer'" in error


def test_a_resumed_twin_goes_on_where_it_was(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts")
    config = text_config("transformer", "bucket", cache=str(tmp_path / "cache"), path=str(texts))
    config["experiment"] |= {"epochs": 2, "checkpoint_every": 1}
    config["experiment"]["output"] = str(tmp_path / "runs")
    result = run_ranks(f"{__name__}:resumed_twin", 1, config=config, folder=str(tmp_path))
    assert result == [[6, 12]]  # micro-batches: 3 batches of 2 per epoch


def resumed_twin(config: dict[str, Any], folder: str) -> list[int]:
    """Worker: positions of the loader after a resume from the first epoch, and at the end."""
    import os

    from ds_al.experiment.job import Job

    os.environ["WANDB_MODE"] = "disabled"
    config = {**config, "associated_learning": {"method": "bp_1f1b"}}
    Job({**config, "experiment": {**config["experiment"], "epochs": 1}}).run()
    (checkpoints,) = Path(folder).glob("runs/tiny/*/checkpoints")
    job = Job(config, resume=str(checkpoints))
    assert job.loader is not None
    positions = [job.loader.position]
    job.run()
    positions.append(job.loader.position)
    job.close()
    return positions
