"""``run/train.py`` as a user starts it, with a config file: by DeepSpeed's launcher where that is what is tested."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ds_al.launch.ranks import free_port
from tests.support.scripts import launch
from tests.support.wandb_files import WandbFile

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
    folder: Path,
    *args: str,
    processes: int = 2,
    config: dict[str, Any] | str = CONFIG,
    launcher: bool = False,
    **env: str,
) -> subprocess.CompletedProcess[str]:
    """Runs the script on all ranks, by DeepSpeed's launcher or as it does, and returns what was printed."""
    path = folder / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    options = ["--deepspeed_config", str(path), "--output", str(folder / "runs"), *args]
    if not launcher:
        return launch("run/train.py", options, ranks=processes, folder=folder, env=env)
    command = [
        sys.executable, "-m", "deepspeed.launcher.runner",
        "--num_accelerators", str(processes), "--master_port", str(free_port()),
        str(ROOT / "run/train.py"), *options,
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
    files = sorted((latest.parent / latest.read_text()).glob("layer_*-model_states.safetensors"))
    return {file.name[:8]: load_file(file) for file in files}


TELLS_HOW_IT_ENDS = """
import atexit, os, sys

class Last:
    def __del__(self, write=os.write):
        write(file, b"taken down")

if any(arg.endswith("train.py") for arg in sys.orig_argv[:3]):
    file = os.open(os.environ["ENDS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    atexit.register(os.write, file, b"exit functions ran")
    sys.last = Last()
"""


@pytest.fixture(scope="module")
def two_stages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One run on two stages, offline, that several tests look at."""
    folder = tmp_path_factory.mktemp("two_stages")
    (folder / "sitecustomize.py").write_text(TELLS_HOW_IT_ENDS)
    options = ("--json", str(folder / "out.json"), "--exit-confidence", "0.3,1")
    env = {"ENDS": str(folder / "ends"), "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    return folder, train(folder, *options, launcher=True, WANDB_MODE="offline", **env)


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
    assert [row["batch"] for row in rows if row["kind"] == "log"] == list(range(10, 91, 10))
    resolved = json.loads((run / "config.json").read_text())["resolved"]
    assert {"method", "stages", "micro_batches", "partition", "model", "data", "seed", "versions"} <= resolved.keys()


def test_exits_have_accuracy_and_cost_and_so_has_leaving_early(
    two_stages: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = two_stages
    (run,) = folder.glob("runs/tiny/*")
    summary = json.loads((run / "summary.json").read_text())
    assert [row["accuracy"] for row in summary["exits"]] == summary["test_accuracy"]
    costs = [row["cost"] for row in summary["exits"]]
    assert costs == sorted(costs) and costs[-1] == 1.0
    early, full = summary["early_exit"]
    assert (early["confidence"], full["confidence"]) == (0.3, 1.0)
    assert full["accuracy"] == summary["test_accuracy"][-1] and full["left"] == [0, 0, 0, 1]
    assert early["cost"] < 1 < full["cost"] and early["left"][0] > 0
    assert (run / "early_exit.png").exists()


def test_wandb_run_is_kept_offline_with_its_config_names_and_summary(
    two_stages: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = two_stages
    (run,) = folder.glob("runs/tiny/*")
    file, summary = WandbFile.of(run), json.loads((run / "summary.json").read_text())
    assert (file.group, file.job_type, file.project) == ("tiny", "streaming", "ds_al")
    assert file.name == f"tiny-streaming-{run.name}" and file.id == (run / "wandb_id").read_text().strip()
    for stage in range(2):
        losses = [file.last(f"stage_{stage}/{name}") for name in ("associated_loss", "autoencoder_loss", "loss")]
        assert losses[0] > 0 and losses[1] > 0
        assert losses[2] == pytest.approx(losses[0] + losses[1])
        assert f"stage_{stage}/idle" in file.history
    assert "stage_2/loss" not in file.history and "validation_accuracy/exit_4" in file.history
    assert file.history["batch"] == list(range(10, 91, 10)) and len(file.history["stage_0/loss"]) == 9
    assert len(file.history["layer_3/associated_loss"]) == 9 and len(file.history["stage_0/idle"]) == 2
    wanted = {"optimizer": "AdamW", "lr": 0.002, "scheduler": "WarmupCosineLR", "epochs": 2, "batch_size": 200}
    assert {key: file.config[key] for key in wanted} == wanted
    assert file.config["associated_learning"]["queue_depth"] == 2 and file.config["experiment"]["log_every"] == 10
    resolved = json.loads((run / "config.json").read_text())["resolved"]
    assert {"method", "partition", "rho", "flops", "parameters", "versions", "git_commit"} <= resolved.keys()
    assert {key: file.config[key] for key in resolved} == resolved
    keys = ("best_validation_accuracy", "best_epoch", "training_seconds", "samples_per_second")
    assert {key: file.summary[key] for key in keys} == {key: summary[key] for key in keys}
    assert file.summary["test_accuracy"] == summary["test_accuracy"][-1]
    assert [file.summary[f"stage_{stage}/idle"] for stage in range(2)] == summary["idle"]
    assert file.summary["curves/_type"] == "image-file"
    assert not file.artifacts  # an option, and off


def test_facts_of_a_run_say_what_it_is_and_where_it_comes_from(
    two_stages: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = two_stages
    (run,) = folder.glob("runs/tiny/*")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["layers"] == 4 and summary["rho"] == pytest.approx(1.106, abs=1e-3)
    assert summary["flops"].keys() == {"f", "b", "g", "h", "twin"}
    assert summary["parameters_total"] == sum(summary["parameters"]) == 507_082
    assert summary["git_commit"] is None  # the folder it was started in is no checkout
    assert summary["command"].startswith("python ") and "run/train.py --deepspeed_config" in summary["command"]
    assert summary["cpu"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    looks = {row["epoch"]: row["validation_accuracy"][-1] for row in rows if "validation_accuracy" in row}
    assert summary["best_validation_accuracy"] == max(looks.values()) == looks[summary["best_epoch"]]


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
    (run,) = tmp_path.glob("runs/tiny/*")
    assert not (run / "wandb").exists() and not (run / "wandb_id").exists()  # disabled leaves nothing


def test_a_resumed_run_ends_on_the_same_weights_and_continues_its_wandb_run(
    two_stages: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    folder, _ = two_stages
    (whole_run,) = folder.glob("runs/tiny/*")
    earlier = tmp_path / "earlier"
    (earlier / "checkpoints").mkdir(parents=True)
    (earlier / "checkpoints/latest").write_text("epoch_1")
    (earlier / "checkpoints/epoch_1").symlink_to(whole_run / "checkpoints/epoch_1")
    shutil.copy(whole_run / "wandb_id", earlier)
    result = train(
        tmp_path,
        *("--resume", str(earlier / "checkpoints"), "--set", "experiment.wandb.checkpoints=true"),
        WANDB_MODE="offline",
    )
    assert result.returncode == 0, result.stderr
    resumed, whole = layer_files(tmp_path), layer_files(folder)
    for layer in whole:
        for name, value in whole[layer].items():
            assert torch.equal(value, resumed[layer][name]), (layer, name)
    (run,) = tmp_path.glob("runs/tiny/*")
    first, second = WandbFile.of(whole_run), WandbFile.of(run)
    assert second.id == first.id == (run / "wandb_id").read_text().strip()
    assert second.resume and not first.resume
    # Batches are counted on: W&B drops what is logged at a step that it has already.
    assert second.history["batch"] == first.history["batch"][4:]
    assert second.history["stage_0/loss"] == first.history["stage_0/loss"][4:]
    (artifact,) = second.artifacts
    assert artifact.type == "model" and set(artifact.aliases) == {"latest", "epoch_2"}
    files = {path.name for path in (run / "checkpoints/epoch_2").iterdir()}
    assert {entry.path for entry in artifact.manifest.contents} == {"latest", *(f"epoch_2/{name}" for name in files)}


def test_early_exit_of_a_network_that_is_trained_already(
    two_stages: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    folder, _ = two_stages
    (whole,) = folder.glob("runs/tiny/*")
    options = ("--resume", str(whole / "checkpoints"), "--exit-confidence", "0.3", "--json", str(tmp_path / "out.json"))
    result = train(tmp_path, *options, WANDB_MODE="disabled")
    assert result.returncode == 0, result.stderr
    before, after = (json.loads((f / "out.json").read_text()) for f in (folder, tmp_path))
    assert after["test_accuracy"] == before["test_accuracy"] and after["training_seconds"] == 0
    assert after["early_exit"] == before["early_exit"][:1]


def test_a_rank_that_is_done_leaves_before_its_interpreter_is_taken_down(
    two_stages: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    """One run in ten or so aborted then, all being done: a thread of gloo freed a tensor just as Python went away."""
    folder, _ = two_stages
    assert (folder / "ends").read_text() == 2 * "exit functions ran"


def test_the_backprop_twin_trains_by_the_same_command(tmp_path: Path) -> None:
    result = train(
        tmp_path, "--method", "bp_1f1b", "--epochs", "1", "--json", str(tmp_path / "out.json"), WANDB_MODE="offline"
    )
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "out.json").read_text())
    assert summary["method"] == "bp_1f1b" and summary["test_accuracy"][-1] > 0.5
    (run,) = tmp_path.glob("runs/tiny/*")
    file = WandbFile.of(run)
    assert (file.group, file.job_type) == ("tiny", "bp_1f1b")  # beside the AL runs, yet told apart
    assert file.last("stage_1/loss") == file.last("loss") > 0
    assert "stage_0/loss" not in file.history and "stage_0/idle" in file.history
    assert file.config["layers"] == 4  # without the twin's head


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
    result = train(tmp_path, *args, config=config, launcher=False, WANDB_MODE="disabled")
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, result.stderr
    assert all(word in errors[0] for word in words), errors
    assert "Traceback" not in result.stderr


def test_what_one_rank_alone_finds_wrong_is_printed_by_all(tmp_path: Path) -> None:
    """As on a host without the config, or with another one."""
    (tmp_path / "of_rank_0.json").write_text(json.dumps(CONFIG))
    script = tmp_path / "start.py"
    script.write_text(
        "import os, runpy, sys\n"
        "sys.argv = ['train.py', '--deepspeed_config', f'of_rank_{os.environ[\"RANK\"]}.json', '--output', 'runs']\n"
        f"runpy.run_path({str(ROOT / 'run/train.py')!r}, run_name='__main__')\n"
    )
    result = launch(str(script), [], ranks=2, folder=tmp_path, env={"WANDB_MODE": "disabled"})
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if ": error: the config, rank 1 (" in line]
    assert sorted(line.split(" (")[0] for line in errors)[:1] in (["rank 0"], ["rank 1"]), result.stderr
    assert all("of_rank_1.json" in line for line in errors)
    assert not (tmp_path / "runs").exists()


def test_more_processes_than_layers_train_parts_of_one(tmp_path: Path) -> None:
    """One AL layer on two processes, with exact back-propagation between them."""
    out = str(tmp_path / "out.json")
    one = "experiment.model.options.widths=[16]"
    result = train(tmp_path, "--epochs", "1", "--set", one, "--json", out, WANDB_MODE="disabled")
    assert result.returncode == 0, result.stderr[-3000:]
    summary = json.loads(Path(out).read_text())
    assert summary["stages"] == 2 and len(summary["test_accuracy"]) == 1


@pytest.mark.parametrize("method", ["streaming", pytest.param("bp_1f1b", marks=pytest.mark.slow)])
def test_a_partition_by_parameters_trains_and_is_recorded(tmp_path: Path, method: str) -> None:
    assignment = 'experiment.partition_method="parameters"'
    out = str(tmp_path / "out.json")
    result = train(
        tmp_path, "--epochs", "1", "--set", assignment, "--method", method, "--json", out, WANDB_MODE="disabled"
    )
    assert result.returncode == 0, result.stderr[-3000:]
    partition = json.loads(Path(out).read_text())["partition"]
    assert partition[0] == 0 and len(partition) == 3 and partition == sorted(partition)
