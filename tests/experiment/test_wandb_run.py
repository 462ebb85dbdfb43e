"""W&B of a run, apart from training: modes, failures, and where it comes from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import wandb

from ds_al.experiment.config import WandbConfig
from ds_al.experiment.wandb_run import WandbRun, named_losses
from ds_al.system import provenance
from tests.experiment.test_train import train
from tests.support.runs import run_info
from tests.support.wandb_files import WandbFile

FACTS = {"method": "streaming", "stages": 2}
SUMMARY = {
    "test_accuracy": [0.5],
    "best_validation_accuracy": 0.6,
    "best_epoch": 1,
    "training_seconds": 2.0,
    "samples_per_second": 3.0,
    "idle": [0.1, 0.2],
}


class FakeRun:
    """A run that fails at every log."""

    id = "an id"

    def log(self, values: Any, step: int | None = None) -> None:
        raise ConnectionError("the line is dead")


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In which modes ``wandb.init`` was called; online it finds no network."""
    modes: list[str] = []

    def init(mode: str, **options: Any) -> FakeRun:
        modes.append(mode)
        if mode == "online":
            raise wandb.errors.CommError("connection refused\nand more")
        return FakeRun()

    monkeypatch.setattr(wandb, "init", init)
    return modes


def run(folder: Path, *, info: dict[str, Any] | None = None, **options: Any) -> WandbRun:
    observer = WandbRun(WandbConfig(**options), FACTS)
    observer.started(run_info(folder, **(info or {})))
    return observer


@pytest.mark.parametrize(
    ("mode", "account", "expected"),
    [(None, False, ["offline"]), (None, True, ["online", "offline"]), ("offline", True, ["offline"])],
)
def test_the_mode_follows_the_account_and_the_variable(
    modes: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
    mode: str | None,
    account: bool,
    expected: list[str],
) -> None:
    if account:
        monkeypatch.setenv("WANDB_API_KEY", "a key")
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    run(tmp_path)
    assert modes == expected
    assert (tmp_path / "wandb_id").read_text() == "an id\n"
    said = [str(w.message) for w in recwarn if "W&B" in str(w.message)]
    assert len(said) == expected.count("online")
    assert all("stays offline" in text and "connection refused" in text for text in said)


def test_online_without_an_account_does_not_ask(
    modes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.warns(UserWarning, match="no W&B account"):
        run(tmp_path)
    assert modes == ["offline"]


def test_disabled_does_nothing(modes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, enabled=False).finished(SUMMARY, [])
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run(tmp_path).log({"loss": 1.0}, step=1)
    assert not modes and not list(tmp_path.iterdir())


def test_a_failure_is_warned_of_once_and_ends_the_logging(modes: list[str], tmp_path: Path) -> None:
    logged = run(tmp_path)
    with pytest.warns(UserWarning, match="training goes on") as said:
        logged.log({"loss": 1.0}, step=1)
        logged.log({"loss": 1.0}, step=2)
        logged.finished(SUMMARY, [])
    assert len([w for w in said if "training goes on" in str(w.message)]) == 1


@pytest.mark.parametrize("timeline", [True, False])
def test_pictures_of_the_folder_are_logged_where_they_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timeline: bool
) -> None:
    import matplotlib.image
    import numpy

    matplotlib.image.imsave(tmp_path / "curves.png", numpy.zeros((2, 2, 3)))
    if timeline:
        matplotlib.image.imsave(tmp_path / "timeline.png", numpy.zeros((2, 3, 3)))
    monkeypatch.setenv("WANDB_MODE", "offline")
    run(tmp_path, group="given").finished(SUMMARY, [])
    wandb.teardown()  # an offline run's file is complete when wandb's process ends, which is after `finish`
    file = WandbFile.of(tmp_path)
    assert file.group == "given" and file.summary["best_epoch"] == 1
    assert "curves/_type" in file.history and ("timeline/_type" in file.history) == timeline


@pytest.mark.parametrize(
    ("settings", "mode", "expected"),
    [
        ("[default]\nmode = offline\n", None, ["offline"]),
        ("[default]\nmode = disabled\n", None, []),
        ("[default]\nmode = online\n", None, ["online", "offline"]),
        ("[default]\nmode = disabled\n", "offline", ["offline"]),  # the variable wins
        ("[default]\nmode = offline\n", "disabled", []),
        ("[default]\nentity = us\n", None, ["online", "offline"]),
        ("no settings at all", None, ["online", "offline"]),
    ],
)
@pytest.mark.parametrize("place", ["wandb", ".wandb", "of the user"])
@pytest.mark.filterwarnings("ignore:W&B is out of reach")
def test_wandb_offline_and_disabled_hold(
    modes: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    settings: str,
    mode: str | None,
    expected: list[str],
) -> None:
    """With an account a run once went online all the same."""
    monkeypatch.setenv("WANDB_API_KEY", "a key")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "of the user"))
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    (tmp_path / place).mkdir()
    (tmp_path / place / "settings").write_text(settings)
    run(tmp_path)
    assert modes == expected


VARIABLES = {
    "WANDB_PROJECT": "theirs",
    "WANDB_NAME": "my run",
    "WANDB_TAGS": "a,b",
    "WANDB_RUN_GROUP": "our group",
    "WANDB_ENTITY": "we",
    "WANDB_NOTES": "a note",
    "WANDB_JOB_TYPE": "trial",
}


def test_variables_win_over_defaults_and_the_config_over_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**VARIABLES, "WANDB_MODE": "offline"}.items():
        monkeypatch.setenv(name, value)
    wandb.teardown()  # it reads the variables once
    own = {"project": "mine", "name": "n", "tags": ["c"], "group": "g", "entity": "e", "notes": "config"}
    files = []
    for number, options in enumerate(({}, own)):
        folder = tmp_path / str(number)
        folder.mkdir()
        run(folder, system_metrics=False, **options).finished(SUMMARY, [])
        wandb.teardown()
        files.append(WandbFile.of(folder))
    seen = [(f.project, f.name, f.tags, f.group, f.entity, f.notes, f.job_type) for f in files]
    assert seen[0] == ("theirs", "my run", ["a", "b"], "our group", "we", "a note", "trial")
    assert seen[1] == ("mine", "n", ["c"], "g", "e", "config", "trial")


def test_the_folder_of_wandb_dir_is_honoured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    run(tmp_path / "run").finished(SUMMARY, [])
    wandb.teardown()
    assert WandbFile.of(tmp_path / "elsewhere").project == "ds_al" and not (tmp_path / "run/wandb").exists()


@pytest.mark.parametrize("twin", [False, True])
def test_rows_are_logged_as_they_happen_at_their_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, twin: bool
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    logged = run(tmp_path, info={"total_batches": 24})
    losses = {"loss": 1.5} if twin else {"losses": [[1.0, 2.0], [float("nan"), float("nan")]]}
    for batch in (10, 20):
        row = {"epoch": 1, "batch": batch, "learning_rate": 0.1, "samples_per_second": 5.0}
        logged.logged({**row, **losses})
    logged.epoch({"epoch": 3, "samples_per_second": 5.0, "learning_rate": 0.1, "idle": [0.1, 0.2]})
    logged.finished(SUMMARY, [])
    wandb.teardown()
    file = WandbFile.of(tmp_path)
    assert file.steps[:3] == [10, 20, 24], "an epoch that max_batches cuts ends at its last batch"
    assert file.history["batch"] == [10, 20] and file.history["learning_rate"] == [0.1] * 3
    if twin:
        assert file.history["loss"] == [1.5, 1.5]
    else:
        assert file.history["layer_0/autoencoder_loss"] == [2.0, 2.0] and file.history["stage_0/loss"] == [3.0, 3.0]
        assert "layer_1/associated_loss" not in file.history, "what is not known yet is left out"


def test_losses_of_a_stage_are_means_over_its_layers() -> None:
    named = named_losses([[1.0, 10.0], [3.0, 30.0], [5.0, 50.0]], bounds=[0, 2, 3])
    assert named["stage_0/associated_loss"] == 2.0 and named["stage_0/autoencoder_loss"] == 20.0
    assert named["stage_0/loss"] == 22.0 and named["stage_1/loss"] == 55.0
    assert [named[f"layer_{layer}/associated_loss"] for layer in range(3)] == [1.0, 3.0, 5.0]


def git(folder: Path, *args: str) -> None:
    subprocess.run(
        ["git", "-c", "user.name=n", "-c", "user.email=e@example.org", *args],
        cwd=folder,
        check=True,
        capture_output=True,
    )


def test_the_commit_is_named_and_marked_where_files_differ(tmp_path: Path) -> None:
    assert provenance.git_commit(tmp_path) is None
    git(tmp_path, "init")
    assert provenance.git_commit(tmp_path) is None  # no commit yet
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "m")
    commit = provenance.git_commit(tmp_path)
    assert commit is not None and len(commit) == 40
    (tmp_path / "file").write_text("2")
    assert provenance.git_commit(tmp_path) == f"{commit}-dirty"


def test_no_git_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git_commit(".") is None


def test_the_command_leaves_out_the_launchers_own_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run/train.py", "--local_rank=1", "--set", "a b=1"])
    assert provenance.command() == "python run/train.py --set 'a b=1'"


@pytest.mark.distributed
def test_no_secret_reaches_the_folder_of_a_run(tmp_path: Path) -> None:
    secrets = {name: f"{name.lower()}-0123456789" for name in ("WANDB_API_KEY", "HF_TOKEN", "COMET")}
    config = {
        "train_micro_batch_size_per_gpu": 50,
        "gradient_accumulation_steps": 2,
        "steps_per_print": None,
        "optimizer": {"type": "SGD", "params": {"lr": 0.01}},
        "comet": {"enabled": False, "api_key": secrets["COMET"]},
        "associated_learning": {"method": "bp_1f1b"},
        "experiment": {
            "name": "twin", "model": {"name": "mlp"}, "data": {"name": "fashion-mnist-small"}, "epochs": 1,
            "max_batches": 4, "test": False, "log_every": 2, "wandb": {"notes": f"by {secrets['HF_TOKEN']}"},
        },
    }  # fmt: skip
    variables = {name: secrets[name] for name in ("WANDB_API_KEY", "HF_TOKEN")}
    argument = ["--set", f"comet.api_key={secrets['COMET']}"]
    result = train(tmp_path, *argument, processes=1, config=config, WANDB_MODE="offline", **variables)
    assert result.returncode == 0, result.stderr
    (folder,) = tmp_path.glob("runs/twin/*")
    files = [path for path in folder.rglob("*") if path.is_file()]
    found = {path.name for path in files for secret in secrets.values() if secret.encode() in path.read_bytes()}
    assert len(files) > 10 and not found
    file = WandbFile.of(folder)
    assert file.history["batch"] == [2, 4] and max(file.steps) == 4 and len(file.history["loss"]) == 2
    assert file.config["deepspeed"]["comet"] == {"enabled": False} and file.config["lr"] == 0.01
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(row["kind"], row.get("batch")) for row in rows] == [("log", 2), ("log", 4), ("epoch", None)]
