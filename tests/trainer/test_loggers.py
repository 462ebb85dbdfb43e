"""Loggers of transformers in ``ALTrainer``: by ``report_to`` or as a callback, on the first rank alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from transformers import integrations

from ds_al.errors import ALConfigError
from ds_al.launch.ranks import run_ranks
from tests.support.wandb_files import WandbFile
from tests.trainer.test_trainer import CONFIG, LR, MICRO_BATCH, STEPS_PER_EPOCH, rows, trainer

pytestmark = pytest.mark.distributed

OPTIONS = {"num_train_epochs": 1, "logging_steps": 1, "eval_strategy": "epoch", "run_name": "mine"}


def with_wandb(folder: str) -> tuple[list[str], dict[str, Any]]:
    """Worker: trains and predicts with W&B offline; what callbacks read of the arguments."""
    import wandb

    os.environ |= {"WANDB_MODE": "offline", "WANDB_DIR": folder, "WANDB_SILENT": "true", "WANDB_PROJECT": "texts"}
    (Path(folder) / "file").touch()
    with pytest.raises(ALConfigError, match="which rank 0 cannot make: FileExistsError"):  # on both ranks
        trainer(f"{folder}/file")
    told = trainer(f"{folder}/out", report_to="wandb", **OPTIONS)
    told.train()
    told.predict(rows(1))
    wandb.finish()
    args = told._reported
    names = ("learning_rate", "world_size", "process_index", "n_gpu", "should_save")
    read = {name: getattr(args, name) for name in names}
    with pytest.raises(AttributeError, match=r"reads args\.warmup_ratio"):
        args.warmup_ratio  # noqa: B018
    assert args.to_sanitized_dict()["learning_rate"] == LR and '"run_name": "mine"' in args.to_json_string()
    return [type(callback).__name__ for callback in told.callback_handler.callbacks], read


def test_wandb_has_settings_and_metrics(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    first, second = run_ranks(f"{__name__}:with_wandb", 2, folder=str(tmp_path))
    assert first[0] == second[0] == ["DefaultFlowCallback", "PrinterCallback", "WandbCallback"]
    shared = {"learning_rate": LR, "world_size": 2, "n_gpu": 1}
    assert [first[1], second[1]] == [{**shared, "process_index": i, "should_save": i == 0} for i in (0, 1)]
    run = WandbFile.of(tmp_path)
    assert (run.name, run.project) == ("mine", "texts")
    assert (run.config["learning_rate"], run.config["optim"], run.config["eval_strategy"]) == (LR, "AdamW", "epoch")
    assert run.config["per_device_train_batch_size"] == MICRO_BATCH and run.config["model_type"] == "bert"
    assert run.config["deepspeed"]["optimizer"] == CONFIG["optimizer"]
    steps = list(range(1, STEPS_PER_EPOCH + 1))
    assert run.history["train/global_step"][:STEPS_PER_EPOCH] == steps
    assert len(run.history["train/loss"]) == len(run.history["train/layer_1/associated_loss"]) == STEPS_PER_EPOCH
    assert 0 <= run.last("eval/accuracy") <= 1 and run.last("train/learning_rate") == LR
    assert run.summary["train_loss"] > 0


LOGGERS = ("tensorboard", "mlflow", "comet_ml", "clearml", "dvclive", "trackio", "codecarbon")


def with_logger(name: str, folder: str) -> None:
    """Worker: trains with a logger that has no server."""
    os.chdir(folder)
    os.environ |= {"COMET_MODE": "offline", "COMET_START_MODE": "create", "COMET_START_ONLINE": "false"}
    os.environ |= {"COMET_OFFLINE_DIRECTORY": folder, "CLEARML_OFFLINE_MODE": "1", "TRACKIO_DIR": folder}
    os.environ |= {"MLFLOW_TRACKING_URI": f"file:{folder}/mlruns", "MLFLOW_ALLOW_FILE_STORE": "true"}
    trainer(f"{folder}/out", report_to=[name], **OPTIONS).train()


@pytest.mark.parametrize("name", LOGGERS)
def test_loggers_that_are_installed_work(name: str, tmp_path: Path) -> None:
    """Those that a developer has: they are no dependency."""
    if name not in integrations.integration_utils.get_available_reporting_integrations():
        pytest.skip(f"{name} is not installed")
    run_ranks(f"{__name__}:with_logger", 1, name=name, folder=str(tmp_path))
    if name == "tensorboard":
        assert list(tmp_path.rglob("events.out.tfevents*"))
