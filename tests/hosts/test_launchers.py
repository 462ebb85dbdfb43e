"""The commands of docs/clusters.md start a run on two hosts, as they stand there; the weights are those of one host."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.experiment.test_train import CONFIG, layer_files, train
from tests.support.hosts import Host, finished, two_hosts
from tests.support.ranks import ROOT
from tests.support.wandb_files import WandbFile

pytestmark = [pytest.mark.distributed, pytest.mark.alone, pytest.mark.slow]

PAGE = (ROOT / "docs/clusters.md").read_text()
SHORT = {**CONFIG, "experiment": {**CONFIG["experiment"], "epochs": 1, "max_batches": 8}}
SRUN = """#!/bin/bash
# Starts the tasks of this host, as srun does on each.
for ((task = 0; task < 2; task++)); do
    SLURM_PROCID=$((2 * NODE + task)) SLURM_LOCALID=$task SLURM_NTASKS=4 "$@" &
    tasks+=($!)
done
for task in "${tasks[@]}"; do wait "$task" || exit 1; done
"""
SLURM = {"SLURM_JOB_NODELIST": "node[0-1]", "SLURM_CPUS_PER_TASK": "1"}


def snippet(section: str, kind: str) -> str:
    """A block of code of the page."""
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[0]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    """Two hosts with the files that the commands name."""
    with two_hosts(tmp_path) as both:
        for host in both:
            (host.folder / "run").symlink_to(ROOT / "run")
            (host.folder / "config.json").write_text(json.dumps(SHORT))
            (host.folder / "hosts").write_text(snippet("`deepspeed`, without ssh", "text"))
            for name, script in (("srun", SRUN), ("scontrol", "#!/bin/bash\nprintf 'node0\\nnode1\\n'\n")):
                (host.folder / name).write_text(script)
                (host.folder / name).chmod(0o755)
        yield both


def both_run(hosts: tuple[Host, Host], script: str, **env: str) -> list[str]:
    """Outputs of a script of the page on both hosts, whose shared folder is that above theirs."""
    shared = hosts[0].folder.parent
    script = script.replace("/shared/", f"{shared}/")
    logs = [host.folder / "log" for host in hosts]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    processes = [
        host.start(
            ["bash", "-ec", script],
            env={"NODE": str(number), "PATH": f"{host.folder}:{path}", "WANDB_MODE": "offline", **env},
            log=log,
        )
        for number, (host, log) in enumerate(zip(hosts, logs, strict=True))
    ]
    outputs = finished(processes, logs, seconds=280)
    assert [process.returncode for process in processes] == [0, 0], "\n".join(text[-3000:] for text in outputs)
    return outputs


def check(hosts: tuple[Host, Host], processes: int, *options: str) -> dict[str, Any]:
    """Compares the run of two hosts with one of this machine, and returns its summary."""
    shared, alone = hosts[0].folder.parent, hosts[0].folder.parent / "alone"
    alone.mkdir()
    result = train(alone, *options, processes=processes, config=SHORT, WANDB_MODE="disabled")
    assert result.returncode == 0, result.stderr[-3000:]
    weights, expected = layer_files(shared), layer_files(alone)
    assert weights.keys() == expected.keys()
    for layer, state in expected.items():
        assert all(torch.equal(value, weights[layer][name]) for name, value in state.items()), layer
    (run,), (near,) = shared.glob("runs/tiny/*"), alone.glob("runs/tiny/*")
    summary, beside = (json.loads((folder / "summary.json").read_text()) for folder in (run, near))
    assert summary["test_accuracy"] == beside["test_accuracy"]
    assert WandbFile.of(run).group == "tiny"
    return {**summary, "run": run}


def test_by_deepspeed_with_a_host_file(hosts: tuple[Host, Host]) -> None:
    command = snippet("`deepspeed`, without ssh", "bash on each host").rstrip()
    both_run(hosts, f"{command} --trace")
    summary = check(hosts, 2)
    trace = summary["run"] / "trace"
    about = json.loads((trace / "trace.json").read_text())
    assert about and (summary["run"] / "timeline.png").exists()
    checkpoints = summary["run"] / "checkpoints"
    both_run(hosts, f"{command} --resume {checkpoints} --set experiment.max_batches=12")
    assert len(list(checkpoints.parent.parent.iterdir())) == 2
    assert not list(Path("/dev/shm").glob("deepspeed_allreduce_buffer_*_29500_*"))


def test_by_torchrun_on_four_stages_and_on_replicas(hosts: tuple[Host, Host]) -> None:
    command = snippet("`torchrun`", "bash on each host").rstrip()
    both_run(hosts, command)
    assert check(hosts, 4)["stages"] == 4
    for folder in ("runs", "alone"):
        (hosts[0].folder.parent / folder).rename(hosts[0].folder.parent / f"{folder} of four stages")
    both_run(hosts, f"{command} --stages 2")
    assert check(hosts, 4, "--stages", "2")["copies"] == 2


def test_as_a_job_of_slurm(hosts: tuple[Host, Host]) -> None:
    both_run(hosts, snippet("Slurm", "bash as a job"), **SLURM)
    assert check(hosts, 4)["stages"] == 4
