"""``run/train.py`` as a user starts it: through DeepSpeed's launcher, with a config file."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_al.launch import free_port

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).resolve().parents[2]

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 50,
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 0.0,
    "steps_per_print": None,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.002, "torch_adam": True}},
    "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": "auto", "warmup_num_steps": 10}},
    "experiment": {
        "name": "tiny",
        "model": {"name": "mlp"},
        "data": {"name": "fashion-mnist-small", "augment": "crop_and_flip"},
        "epochs": 2,
        "checkpoint_every": 1,
        "seed": 3,
    },
}


def train(
    folder: Path, *args: str, processes: int = 2, config: dict[str, Any] | str = CONFIG, **env: str
) -> subprocess.CompletedProcess[str]:
    """Runs the launcher and returns what it printed."""
    path = folder / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    command = [
        sys.executable, "-m", "deepspeed.launcher.runner",
        "--num_accelerators", str(processes), "--master_port", str(free_port()),
        str(ROOT / "run/train.py"), "--deepspeed_config", str(path), "--output", str(folder / "runs"), *args,
    ]  # fmt: skip
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", **env},
        stdin=subprocess.DEVNULL,
        text=True,
        capture_output=True,
        timeout=280,
    )


def layer_files(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Weights by layer file of the last checkpoint."""
    (latest,) = folder.glob("runs/tiny/*/checkpoints/latest")
    files = sorted((latest.parent / latest.read_text()).glob("layer_*"))
    return {file.name[:8]: torch.load(file, weights_only=False) for file in files}


def wandb_records(data: bytes) -> Iterator[Any]:
    """Records of a W&B run file: a LevelDB log of protobuf messages after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    position, message = 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # a block's tail is too short for a chunk's header
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        message += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last chunk
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            message = b""
            yield record


@pytest.fixture(scope="module")
def two_stages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One run on two stages, offline, that several tests look at."""
    folder = tmp_path_factory.mktemp("two_stages")
    return folder, train(folder, "--json", str(folder / "out.json"), WANDB_MODE="offline")


def test_prints_the_accuracy_last_and_leaves_its_files(
    two_stages: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, result = two_stages
    assert result.returncode == 0, result.stderr
    summary = json.loads((folder / "out.json").read_text())
    lines = [line for line in result.stdout.splitlines() if "[INFO]" not in line and line.strip()]
    assert lines[-1] == f"test accuracy {summary['test_accuracy'][-1]:.4f}"
    assert summary["test_accuracy"][-1] > 0.6
    assert len(summary["test_accuracy"]) == summary["partition"][-1]
    assert summary["test_samples"] == 2000
    assert summary["bytes_sent"][0] > 0 and summary["bytes_sent"][-1] == 0
    assert all(0 <= idle < 1 for idle in summary["idle"])
    assert all(peak > 0 for peak in summary["peak_activation_bytes"])
    (run,) = folder.glob("runs/tiny/*")
    assert {"config.json", "metrics.jsonl", "summary.json", "curves.png", "checkpoints", "wandb"} <= {
        path.name for path in run.iterdir()
    }
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows if row["kind"] == "epoch"] == [1, 2]
    assert len([row for row in rows if row["kind"] == "batch"]) == 2 * 45
    resolved = json.loads((run / "config.json").read_text())["resolved"]
    assert {"method", "stages", "micro_batches", "partition", "model", "data", "seed", "versions"} <= resolved.keys()


def test_wandb_run_is_kept_offline_with_its_config_and_names(
    two_stages: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = two_stages
    (file,) = folder.glob("runs/tiny/*/wandb/offline-run-*/run-*.wandb")
    names, config = set(), {}
    for record in wandb_records(file.read_bytes()):
        for item in record.history.item:
            names.add(item.key or "/".join(item.nested_key))
        for item in [*record.run.config.update, *record.config.update]:
            config[item.key] = item.value_json
    assert {"stage_0/associated_loss", "stage_1/autoencoder_loss", "validation_accuracy/exit_1"} <= names
    assert {"method", "stages", "micro_batches", "partition", "model", "data", "seed", "versions"} <= config.keys()
    assert config["stages"] == "2"


def test_one_process_ends_on_the_same_weights(
    two_stages: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    folder, _ = two_stages
    result = train(tmp_path, "--json", str(tmp_path / "out.json"), processes=1, WANDB_MODE="disabled")
    assert result.returncode == 0, result.stderr
    one, two = layer_files(tmp_path), layer_files(folder)
    assert one.keys() == two.keys()
    for layer in one:
        for name, value in one[layer].items():
            assert torch.equal(value, two[layer][name]), (layer, name)
    accuracies = [json.loads((f / "out.json").read_text())["test_accuracy"] for f in (tmp_path, folder)]
    assert accuracies[0] == accuracies[1]


def test_a_resumed_run_ends_on_the_same_weights(
    two_stages: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    folder, _ = two_stages
    (checkpoints,) = folder.glob("runs/tiny/*/checkpoints")
    (tmp_path / "latest").write_text("epoch_1")
    (tmp_path / "epoch_1").symlink_to(checkpoints / "epoch_1")
    result = train(tmp_path, "--resume", str(tmp_path), WANDB_MODE="disabled")
    assert result.returncode == 0, result.stderr
    resumed, whole = layer_files(tmp_path), layer_files(folder)
    for layer in whole:
        for name, value in whole[layer].items():
            assert torch.equal(value, resumed[layer][name]), (layer, name)


def test_the_backprop_twin_trains_by_the_same_command(tmp_path: Path) -> None:
    result = train(
        tmp_path, "--method", "bp_1f1b", "--epochs", "1", "--json", str(tmp_path / "out.json"), WANDB_MODE="disabled"
    )
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "out.json").read_text())
    assert summary["method"] == "bp_1f1b" and summary["test_accuracy"][-1] > 0.5


@pytest.mark.parametrize(
    ("args", "config", "words"),
    [
        (["--set", "experiment.model.name=vvg"], CONFIG, ["vvg", "vgg"]),
        ([], "{not json", ["config.json", "not valid JSON"]),
    ],
    ids=["unknown model", "malformed"],
)
def test_a_bad_config_ends_with_one_clear_message(
    tmp_path: Path, args: list[str], config: Any, words: list[str]
) -> None:
    result = train(tmp_path, *args, config=config, WANDB_MODE="disabled")
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, result.stderr
    assert all(word in errors[0] for word in words), errors
    assert "Traceback" not in result.stderr


def test_a_number_of_processes_that_does_not_fit_names_those_that_do(tmp_path: Path) -> None:
    result = train(tmp_path, "--set", "experiment.model.options.widths=[16]", WANDB_MODE="disabled")
    assert result.returncode != 0
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "2 processes for 1 AL layers" in error and "Start 1" in error


@pytest.mark.parametrize("method", ["streaming", "bp_1f1b"])
def test_a_partition_by_parameters_trains_and_is_recorded(tmp_path: Path, method: str) -> None:
    assignment = 'experiment.partition_method="parameters"'
    out = str(tmp_path / "out.json")
    result = train(
        tmp_path, "--epochs", "1", "--set", assignment, "--method", method, "--json", out, WANDB_MODE="disabled"
    )
    assert result.returncode == 0, result.stderr[-3000:]
    partition = json.loads(Path(out).read_text())["partition"]
    assert partition[0] == 0 and len(partition) == 3 and partition == sorted(partition)
