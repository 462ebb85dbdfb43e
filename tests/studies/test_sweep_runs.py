"""A sweep runs each run once: what is done stays done, what failed is told and tried again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ds_al.studies.runs import RunFile
from ds_al.studies.sweep.runner import execute, is_done, result_of
from ds_al.studies.sweep.spec import Run
from tests.support.scripts import call

pytestmark = pytest.mark.distributed

SCRIPT = """
import json, pathlib, sys, time
args = dict(zip(sys.argv[1::2], sys.argv[2::2])) if not sys.argv[1].startswith("--local_rank=") else dict(
    zip(sys.argv[2::2], sys.argv[3::2]))
config = json.loads(pathlib.Path(args["--deepspeed_config"]).read_text())
time.sleep(config["sleep"])
if config["fail"]:
    sys.exit("broken on purpose")
folder = pathlib.Path(config["experiment"]["output"]) / str(config["sleep"])
folder.mkdir(parents=True)
(folder / "metrics.jsonl").write_text('{"kind": "batch"}\\n{"kind": "epoch", "seconds": 1.0}\\n')
wandb = config["experiment"]["wandb"]
facts = {"wandb": wandb, "folder": str(folder), "command": "x", "rho": 0.9}
facts["data"] = {"path": "x", "from": config["experiment"]["data"].get("path")}
(folder / "summary.json").write_text(json.dumps(facts))
pathlib.Path(args["--json"]).write_text(json.dumps({"folder": str(folder)}))
"""


def one(seed: int, *, sleep: float = 0.0, fail: bool = False, path: str | None = None) -> Run:
    config = {"sleep": sleep, "fail": fail, "experiment": {"data": {"path": path} if path else {}}}
    return Run("group", "mse", None, 2, 1, seed, config)


def run(
    runs: list[Run], folder: Path, *, timeout: float = 60.0, jobs: int = 2, **options: Any
) -> list[tuple[Run, dict[str, Any]]]:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    seen: list[tuple[Run, dict[str, Any]]] = []
    execute(
        runs, file=RunFile(folder / "results.runs.jsonl"), script=script, data=Path("/data"), jobs=jobs,
        timeout=timeout, done=lambda *each: seen.append(each), **options,
    )  # fmt: skip
    return seen


def test_what_is_done_stays_done_and_a_failure_is_told_and_tried_again(tmp_path: Path) -> None:
    good, bad, hanging = one(0, path="cifar"), one(1, fail=True), one(2, sleep=50.0)
    ended = run([good, bad], tmp_path, timeout=120.0)
    results = {each.seed: result for each, result in [*ended, *run([hanging], tmp_path, timeout=5.0)]}
    assert results[0]["data"] == {"from": "/data/cifar"} and results[0]["rho"] == 0.9
    assert results[0]["history"] == [{"kind": "epoch", "seconds": 1.0}]
    assert results[0]["wandb"] == {"group": "results-group"}  # of all runs that are compared
    assert not {"folder", "command"} & results[0].keys()
    assert (results[0]["suite_method"], results[0]["K"], results[0]["P"]) == ("mse", 2, 1)
    assert "broken on purpose" in results[1]["failure"]
    assert results[2]["failure"] == "not done after 5 s"
    found = RunFile(tmp_path / "results.runs.jsonl").read()
    assert [is_done(each, found) for each in (good, bad, hanging)] == [True, False, False]
    renamed = Run("new title", "contrast", None, 2, 1, 0, good.config)
    assert (result_of(renamed, found) or {})["group"] == "new title"
    started: list[int] = []
    run([good, bad], tmp_path, starts=lambda each: started.append(each.seed))
    assert started == [1], "what failed is tried again"


def test_a_small_suite_makes_a_table_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    (tmp_path / "base.json").write_text(json.dumps({
        "train_micro_batch_size_per_gpu": 100, "gradient_accumulation_steps": 3, "gradient_clipping": 0.0,
        "steps_per_print": None, "optimizer": {"type": "AdamW", "params": {"lr": 0.002, "torch_adam": True}},
        "experiment": {"name": "tiny", "model": {"name": "mlp"}, "data": {"name": "fashion-mnist-small"},
                       "epochs": 1, "evaluate_fully": True},
    }))  # fmt: skip
    (tmp_path / "suite.yaml").write_text(
        "name: tiny\nconfig: base.json\ngroups:\n  - name: Fashion, MLP\n    layers: [4]\n    methods:\n"
        "      bp: {}\n      contrast: {method: contrast, experiment.model.al_options: {objective: {name: contrast}}}\n"
    )
    arguments = ["--sweep", str(tmp_path / "suite.yaml"), "--seeds", "1", "--json", str(tmp_path / "out.json")]
    for expected in (2, 0):
        done = call("run/compare.py", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count(": test accuracy 0.") == expected
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["method"], row["K"], row["seeds"], row["failed"]) for row in rows] == [
        ("bp", None, 1, 0),
        ("contrast", 4, 1, 0),
    ]
    for row in rows:
        assert row["test_accuracy"] > 0.5 and row["train_accuracy"] > 0.5 and row["seconds_per_epoch"] > 0
        assert row["parameters"] > 0 and (row["rho"] is None) == (row["K"] is None)
        assert row["test_accuracy_at_best_validation"] == row["test_accuracy"]  # of a single epoch
    assert "### Fashion, MLP" in (tmp_path / "out.md").read_text()
    assert (tmp_path / "out.csv").exists()
