"""Two hosts that cannot work together: every rank ends within a minute, with a message that says what to set where."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ds_al.parallel import facts
from ds_al.parallel.world import join_world
from tests.experiment.test_train import CONFIG
from tests.support.engines import MICRO_BATCHES, make_engine
from tests.support.hosts import Host, Places, finished, two_hosts
from tests.support.networks import NETWORKS
from tests.support.ranks import ROOT, RankFailure, run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.alone]

PORT = 29500
REMEDY = "Set GLOO_SOCKET_IFNAME on every host to the interface that joins the hosts (lo, link0 on"


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    with two_hosts(tmp_path) as both:
        yield both


def trained(places: Places, variables: dict[str, str]) -> None:
    """Worker: trains one batch; the second host has variables of its own."""
    if places.here().name == "node1":
        os.environ |= variables
    engine = make_engine("mlp")
    engine.train_batch(iter(NETWORKS["mlp"].batches(MICRO_BATCHES)))
    engine.flush()


def outputs(hosts: tuple[Host, Host], **variables: str) -> list[str]:
    """What two ranks print that cannot start, one on each host."""
    env = {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": str(PORT)}
    with pytest.raises(RankFailure) as caught:
        run_ranks(f"{__name__}:trained", 2, env=env, places=Places(hosts), variables=variables)
    assert caught.value.seconds < 60
    return caught.value.outputs


def test_a_host_whose_name_is_its_own_loopback_address(hosts: tuple[Host, Host]) -> None:
    """As on many Debian and Ubuntu machines; with the interface named, it works."""
    hosts[1].names.write_text(hosts[1].names.read_text().replace(f"{hosts[1].address} node1", "127.0.1.1 node1"))
    for output in outputs(hosts):
        assert "host node1 listens on 127.0.1.1, which host node0 does not reach" in output and REMEDY in output
    env = {"MASTER_ADDR": hosts[0].address, "GLOO_SOCKET_IFNAME": "link0"}
    run_ranks(f"{__name__}:trained", 2, env=env, places=Places(hosts), variables={})


def test_an_interface_that_is_not_there(hosts: tuple[Host, Host]) -> None:
    for output in outputs(hosts, GLOO_SOCKET_IFNAME="eth9"):
        assert "host node1: got GLOO_SOCKET_IFNAME=eth9: " in output and "expected one of lo, link0" in output


def test_a_firewall_that_passes_the_first_port_alone(hosts: tuple[Host, Host]) -> None:
    to = f"rule add to {hosts[0].address} ipproto tcp"
    hosts[1].run("ip", *f"{to} dport {PORT} lookup main pref 10".split())
    hosts[1].run("ip", *f"{to} prohibit pref 20".split())
    for output in outputs(hosts):
        assert f"host node1 does not reach host node0 at {hosts[0].address}:" in output and REMEDY in output
        assert f"host node0 does not reach host node1 at {hosts[1].address}:" in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("host", "kind", "reason"), [(1, "unreachable", "No route to host"), (0, "blackhole", "timed out")]
)
def test_a_host_that_does_not_reach_the_first_one(hosts: tuple[Host, Host], host: int, kind: str, reason: str) -> None:
    """Without a route, or behind a firewall that drops everything: nothing at all comes from it."""
    hosts[host].run("ip", "route", "add", kind, hosts[1 - host].address)
    first, second = outputs(hosts)
    assert f"rank 0 (node0) has waited 15 s for rank 1 of 2, which has not come to {hosts[0].address}:{PORT}" in first
    assert "Is the command running there" in first
    assert f"rank 1 of 2 has not come within 45 s to {hosts[0].address}:{PORT} (MASTER_ADDR:MASTER_PORT)" in first
    assert "rank 0 (node0) came. What the missing ranks print says why" in first and "DS_AL_START_SECONDS" in first
    assert f"host node1 cannot reach the first rank at {hosts[0].address}:{PORT} (MASTER_ADDR:MASTER_PORT)" in second
    assert reason in second


def of_another_release(places: Places, package: str) -> None:
    """Worker: joins the others; the second host has another release of a package."""
    if places.here().name == "node1":
        real, facts.VERSION = facts.release, "0.0.9" if package == "ds_al" else facts.VERSION
        facts.release = lambda name: "1.9.1" if name == package else real(name)
    join_world()


@pytest.mark.parametrize(("package", "other"), [("torch", "1.9.1"), ("ds_al", "0.0.9")])
def test_another_release_on_one_host(hosts: tuple[Host, Host], package: str, other: str) -> None:
    """It is found before gloo or NCCL of the two speak with each other."""
    with pytest.raises(RankFailure) as caught:
        run_ranks(
            f"{__name__}:of_another_release", 2, env={"MASTER_ADDR": hosts[0].address}, places=Places(hosts),
            package=package,
        )  # fmt: skip
    assert caught.value.seconds < 60
    for output in caught.value.outputs:
        assert f"the software is not the same on all ranks: {package} is " in output
        assert f"{other} on rank 1 (node1)" in output and " on rank 0 (node0), " in output


JOIN = """
import sys, time
from pathlib import Path
import torch.distributed as dist
from ds_al.experiment.process import run_rank
from ds_al.parallel.world import join_world

def main():
    join_world()
    Path(sys.argv[1], f"joined {dist.get_rank()}").touch()
    while not Path(sys.argv[1], "go").exists():
        time.sleep(0.05)
    dist.barrier()

run_rank(main)
"""


def joining(host: Host, rank: int, world: int, folder: Path) -> tuple[subprocess.Popen[str], Path]:
    """A rank that joins the others, waits for a file, and meets them once more; and its output."""
    env = {
        "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(world), "MASTER_ADDR": "node0",
        "MASTER_PORT": str(PORT), "DS_AL_START_SECONDS": "50",
    }  # fmt: skip
    log = folder / f"log {host.name} {rank} {time.monotonic()}"
    return host.start([sys.executable, "-c", JOIN, str(folder)], env=env, log=log), log


def until(condition: Callable[[], bool], *, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_two_jobs_on_one_port(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """The second one ends on both of its hosts, whatever its size; the first one goes on."""
    first = [joining(host, rank, 2, tmp_path) for rank, host in enumerate(hosts)]
    until(lambda: len(list(tmp_path.glob("joined *"))) == 2)
    second = [joining(hosts[0], 0, 2, tmp_path), joining(hosts[1], 1, 2, tmp_path), joining(hosts[1], 2, 3, tmp_path)]
    listens, taken, larger = finished(*zip(*second, strict=True), seconds=60)
    assert f"rank 0 cannot listen on node0:{PORT} (MASTER_ADDR:MASTER_PORT)" in listens
    assert f"two processes are rank 1 of the job at node0:{PORT} (MASTER_ADDR:MASTER_PORT): host node1, proc" in taken
    assert "and host node1, process" in taken and "Choose another port" in taken
    assert f"two jobs meet at node0:{PORT} (MASTER_ADDR:MASTER_PORT): the one that is there has 2 ranks" in larger
    assert "that of rank 2 (node1) has 3. Choose another port" in larger
    (tmp_path / "go").touch()
    assert finished(*zip(*first, strict=True), seconds=60)
    assert [process.returncode for process, _ in (*first, *second)] == [0, 0, 1, 1, 1]


@pytest.mark.slow
def test_one_number_for_two_hosts(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """Two processes are rank 1, and rank 2 has not come: all of them end, for the same reason."""
    ranks = [joining(hosts[0], 0, 3, tmp_path), joining(hosts[0], 1, 3, tmp_path), joining(hosts[1], 1, 3, tmp_path)]
    for text in finished(*zip(*ranks, strict=True), seconds=60):
        assert "two processes are rank 1 of the job at" in text and "--node_rank of its own" in text, text
    assert [process.returncode for process, _ in ranks] == [1, 1, 1]


def commands(hosts: tuple[Host, Host], *options: str, roots: tuple[Path, Path] = (ROOT, ROOT)) -> list[str]:
    """What ``run/train.py`` prints on two hosts that refuse to train together, each with a repository of its own."""
    start = time.monotonic()
    logs = [host.folder / "log" for host in hosts]
    processes = []
    for rank, (host, log, root) in enumerate(zip(hosts, logs, roots, strict=True)):
        (host.folder / "config.json").write_text(json.dumps(CONFIG))
        env = {
            "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "node0", "MASTER_PORT": str(PORT),
            "PYTHONPATH": str(root), "WANDB_MODE": "disabled",
        }  # fmt: skip
        script = [sys.executable, str(root / "run/train.py"), "--deepspeed_config", "config.json", *options]
        processes.append(host.start(script, env=env, log=log))
    texts = finished(processes, logs, seconds=100)
    assert [process.returncode for process in processes] == [1, 1], texts
    assert time.monotonic() - start < 60
    return texts


@pytest.mark.slow
def test_a_folder_of_runs_that_the_hosts_do_not_share(hosts: tuple[Host, Host]) -> None:
    """It once trained to its end, waited for 300 s, and lost summary and checkpoint."""
    for text in commands(hosts, "--output", str(hosts[0].private / "runs")):
        assert "the output folder" in text and "(node0)" in text and "runs/tiny/" in text, text


@pytest.mark.slow
def test_hosts_with_different_code(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    other = tmp_path / "other"
    for name in ("ds_al", "run"):
        shutil.copytree(ROOT / name, other / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "ds_al/layer.py").open("a") as file:
        file.write("# changed\n")
    for text in commands(hosts, roots=(ROOT, other)):
        assert "the software is not the same on all ranks: code of ds_al is " in text, text
        assert "rank 0 (node0)" in text and "rank 1 (node1)" in text, text
