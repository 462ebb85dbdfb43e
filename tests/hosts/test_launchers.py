"""The commands of docs/clusters.md start a run on two hosts, as they stand there; the weights are those of one host."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.experiment.test_train import CONFIG, layer_files, train
from tests.support.hosts import Host, finished, two_hosts
from tests.support.ranks import ROOT
from tests.support.sockets import Watch
from tests.support.wandb_files import WandbFile

pytestmark = [pytest.mark.distributed, pytest.mark.alone]
slow = pytest.mark.slow

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
SSH = """#!/bin/bash
# Runs a command on a host, as ssh does: with nothing of the caller's environment.
while [[ $1 == -* ]]; do [[ $1 == -[op] ]] && shift; shift; done
host=$1
case $host in
HOSTS
*) exit 255 ;;
esac
exec nsenter --net=/var/run/netns/$namespace unshare --mount --uts --ipc bash -ec '
    hostname $1
    mount -t tmpfs none /dev/shm
    mount --bind $2 /etc/hosts
    cd $3
    exec env -i HOME=$3 DS_AL_CACHE=$3/cache PATH=$PATH bash -c "$4"' - $host $names $folder "${*:2}"
"""
PDSH = """#!/bin/bash
# Runs a command on hosts side by side, as pdsh -S does; %n in it is the number of the host.
set -o pipefail
while [[ $1 == -* ]]; do
    case $1 in
    -w) hosts=$2; shift 2 ;;
    -f) shift 2 ;;
    *) shift ;;
    esac
done
number=0
for host in ${hosts//,/ }; do
    ssh $host "${*//%n/$number}" |& sed -u "s/^/$host: /" &
    tasks+=($!)
    number=$((number + 1))
done
for task in "${tasks[@]}"; do wait "$task" || exit 1; done
"""
SLURM = {"SLURM_JOB_NODELIST": "node[0-1]", "SLURM_CPUS_PER_TASK": "1"}


def snippet(section: str, kind: str) -> str:
    """A block of code of the page."""
    ((_, text),) = (block for block in blocks(section) if block[0] == kind)
    return text


def blocks(section: str) -> list[tuple[str, str]]:
    """Kind and text of each block of code of a section."""
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"^```(.+?)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_every_block_of_the_page_is_run_here() -> None:
    run = {
        "`deepspeed`, without ssh": ["text", "bash on each host"],
        "`deepspeed`, with ssh": ["bash on the first host", "text"],
        "`torchrun`": ["bash on each host"],
        "Slurm": ["bash as a job"],
    }
    sections = re.findall(r"^## (.+)$", PAGE, re.MULTILINE)
    assert {name: kinds for name in sections if (kinds := [kind for kind, _ in blocks(name)])} == run
    assert len(re.findall("^```", PAGE, re.MULTILINE)) == 2 * sum(map(len, run.values()))


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    """Two hosts with the files that the commands name."""
    with two_hosts(tmp_path) as both:
        for host in both:
            (host.folder / "run").symlink_to(ROOT / "run")
            (host.folder / "config.json").write_text(json.dumps(SHORT))
            (host.folder / "hosts").write_text(snippet("`deepspeed`, without ssh", "text"))
            places = "\n".join(f"{h.name}) namespace={h.namespace} names={h.names} folder={h.folder} ;;" for h in both)
            scripts = {"srun": SRUN, "scontrol": "#!/bin/bash\nprintf 'node0\\nnode1\\n'\n", "pdsh": PDSH}
            for name, script in {**scripts, "ssh": SSH.replace("HOSTS", places)}.items():
                (host.folder / name).write_text(script)
                (host.folder / name).chmod(0o755)
        yield both


def all_run(hosts: Sequence[Host], script: str, **env: str) -> list[str]:
    """Outputs of a script of the page on each of the hosts, whose shared folder is that above theirs."""
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
    assert [process.returncode for process in processes] == [0] * len(hosts), "\n".join(
        text[-3000:] for text in outputs
    )
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


@slow
def test_by_deepspeed_with_a_host_file(hosts: tuple[Host, Host]) -> None:
    """And no process listens on more than the loopback interface and the link between the hosts."""
    command = snippet("`deepspeed`, without ssh", "bash on each host").rstrip()
    with Watch(hosts[0]) as first, Watch(hosts[1]) as second:
        all_run(hosts, f"{command} --trace")
    for host, watch in zip(hosts, (first, second), strict=True):
        assert host.address in watch.found and watch.found <= {host.address, "127.0.0.1", "::1"}, watch.found
    summary = check(hosts, 2)
    trace = summary["run"] / "trace"
    about = json.loads((trace / "trace.json").read_text())
    assert about and (summary["run"] / "timeline.png").exists()
    checkpoints = summary["run"] / "checkpoints"
    all_run(hosts, f"{command} --resume {checkpoints} --set experiment.max_batches=12")
    assert len(list(checkpoints.parent.parent.iterdir())) == 2
    all_run(hosts, "python run/report.py /shared/runs --out report.html")
    pages = [(host.folder / "report.html").read_text() for host in hosts]
    assert all(text.count(run.name) for text in pages for run in checkpoints.parent.parent.iterdir())
    assert not list(Path("/dev/shm").glob("deepspeed_allreduce_buffer_*_29500_*"))


@slow
def test_by_deepspeed_over_ssh(hosts: tuple[Host, Host]) -> None:
    """The name of the second host is its own loopback address: without the exported interface it would not start."""
    hosts[1].names.write_text(hosts[1].names.read_text().replace(f"{hosts[1].address} node1", "127.0.1.1 node1"))
    exports = snippet("`deepspeed`, with ssh", "text").replace("eth0", "link0").replace("THREADS=4", "THREADS=1")
    own = {"WANDB_MODE": "offline", "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR")}
    lines = [f"{name}={value}\n" for name, value in own.items() if value]
    (hosts[0].folder / ".deepspeed_env").write_text("".join([exports, *lines]))
    (text,) = all_run(hosts[:1], snippet("`deepspeed`, with ssh", "bash on the first host"))
    assert "node0: " in text and "node1: " in text
    assert check(hosts, 2)["stages"] == 2


@slow
def test_where_the_command_runs_on_one_host_alone_the_other_one_is_named(hosts: tuple[Host, Host]) -> None:
    script = snippet("`deepspeed`, without ssh", "bash on each host").rstrip()
    with pytest.raises(AssertionError) as caught:
        all_run(hosts[:1], script, DS_AL_START_SECONDS="25")
    assert "rank 0 (node0) has waited 15 s for rank 1 (node1) of 2, which has not come to node0:29500" in str(
        caught.value
    )
    assert "rank 1 (node1) of 2 has not come within 25 s to node0:29500" in str(caught.value)


@slow
def test_by_torchrun_on_four_stages_and_on_replicas(hosts: tuple[Host, Host]) -> None:
    command = snippet("`torchrun`", "bash on each host").rstrip()
    all_run(hosts, command)
    assert check(hosts, 4)["stages"] == 4
    for folder in ("runs", "alone"):
        (hosts[0].folder.parent / folder).rename(hosts[0].folder.parent / f"{folder} of four stages")
    all_run(hosts, f"{command} --stages 2")
    assert check(hosts, 4, "--stages", "2")["copies"] == 2


@slow
def test_as_a_job_of_slurm(hosts: tuple[Host, Host]) -> None:
    all_run(hosts, snippet("Slurm", "bash as a job"), **SLURM)
    assert check(hosts, 4)["stages"] == 4
