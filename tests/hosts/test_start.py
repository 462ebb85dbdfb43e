"""Two hosts that cannot work together: every rank ends within a minute, with a message that says what to set where."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

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


def outputs(hosts: tuple[Host, Host], *, seconds: str = "60", **variables: str) -> list[str]:
    """What two ranks print that cannot start, one on each host."""
    env = {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": str(PORT), "DS_AL_START_SECONDS": seconds}
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
def test_a_host_without_a_route_to_the_first_one(hosts: tuple[Host, Host]) -> None:
    hosts[1].run("ip", "route", "add", "unreachable", hosts[0].address)
    first, second = outputs(hosts, seconds="20")
    assert f"host node1 cannot reach the first rank at {hosts[0].address}:{PORT} (MASTER_ADDR:MASTER_PORT)" in second
    assert "No route to host" in second
    assert "rank 1 of 2 has not come within 20 s; rank 0 (node0) came" in first


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
    texts = finished(processes, logs, seconds=200)
    assert [process.returncode for process in processes] == [1, 1], texts
    assert time.monotonic() - start < 180
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
        assert "code of ds_al is " in text and "rank 0 (node0)" in text and "rank 1 (node1)" in text, text
