"""Recovery on two hosts: workers die on either, and a keeper that is lost with its host ends the job on the other."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_al.launch.ranks import run_ranks
from ds_al.parallel.launchers import has_ended, parent_of
from tests.recovery.script import Death, Result, run
from tests.support.engines import different, merge
from tests.support.hosts import Host, finished, two_hosts

pytestmark = [pytest.mark.distributed, pytest.mark.alone, pytest.mark.slow]

SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
from tests.recovery import script

options = json.loads(Path(sys.argv[-1]).read_text())
deaths = [script.Death(*death) for death in options.pop("deaths")]
result = script.run(options.pop("folder"), deaths, **options)
torch.save(tuple(result), f"{Path(sys.argv[-1]).parent}/result_{os.environ['RANK']}")
"""
OWN_MACHINE = "mount --bind boot_id /proc/sys/kernel/random/boot_id; "
"""Hosts see each other's processes here, which a machine of its own does not."""
DEEPSPEED = (
    "deepspeed --hostfile hosts --no_ssh --node_rank $NODE --master_addr node0 --master_port 29500 script.py {options}"
)
TORCHRUN = (
    "torchrun --nnodes 2 --node_rank $NODE --nproc_per_node {near} --master_addr node0 --master_port 29500 "
    "script.py {options}"
)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    with two_hosts(tmp_path) as both:
        for host in both:
            (host.folder / "script.py").write_text(SCRIPT)
        yield both


class Run:
    """One run of the script on both hosts.

    Args:
        hosts: both.
        command: of each host.
        world: number of ranks, half of them on each host.
        deaths: of all ranks.
        folder: of the saves; a relative one is another on each host.
        script: more arguments of the script's run.
    """

    def __init__(
        self, hosts: tuple[Host, Host], command: str, *, world: int, deaths: Sequence[Death], folder: str, **script: Any
    ) -> None:
        self.shared, self.hosts, self.world, self.deaths = hosts[0].folder.parent, hosts, world, deaths
        options = self.shared / "options.json"
        recovery = {"folder": folder, "every": 8, "max_restarts": 8}
        options.write_text(json.dumps({"folder": str(self.shared), "deaths": deaths, "recovery": recovery, **script}))
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        for host in hosts:
            (host.folder / "boot_id").write_text(f"boot of {host.name}\n")
            (host.folder / "hosts").write_text("".join(f"node{n} slots={world // 2}\n" for n in range(2)))
        self.logs = [host.folder / "log" for host in hosts]
        self.processes = [
            host.start(
                ["bash", "-ec", OWN_MACHINE + command.format(options=options, near=world // 2)],
                env={"NODE": str(number), "PATH": path},
                log=log,
            )
            for number, (host, log) in enumerate(zip(hosts, self.logs, strict=True))
        ]

    def workers(self, rank: int) -> list[int]:
        """Processes that have been the worker of a rank."""
        path = self.shared / f"processes_{rank}"
        return [int(process) for process in path.read_text().split()] if path.exists() else []

    def await_workers(self) -> None:
        """Waits until every rank has one."""
        limit = time.monotonic() + 150
        while not all(self.workers(rank) for rank in range(self.world)):
            assert time.monotonic() < limit, [log.read_text()[-3000:] for log in self.logs]
            time.sleep(0.2)

    def results(self) -> list[Result]:
        """What the ranks return."""
        outputs = finished(self.processes, self.logs, seconds=280)
        assert [process.returncode for process in self.processes] == [0, 0], "\n".join(text[-4000:] for text in outputs)
        return [Result(*torch.load(self.shared / f"result_{rank}")) for rank in range(self.world)]


@pytest.mark.parametrize(
    ("command", "folder"), [(DEEPSPEED, "recovery"), (TORCHRUN, "/shared/recovery")], ids=["deepspeed", "torchrun"]
)
def test_nothing_differs_where_workers_die_on_either_host(
    hosts: tuple[Host, Host], tmp_path: Path, command: str, folder: str
) -> None:
    """Rank 0 and rank 2 die at once, whose neighbours are on the other host too; saves are on a disk of each host, or
    on a shared one."""
    deaths = [Death(1, 0, "forward", 9), Death(2, 0, "forward", 21), Death(0, 0, "between", 6)]
    one = run_ranks(f"{run.__module__}:run", 4, folder=str(tmp_path / "one"), deaths=[])
    job = Run(hosts, command, world=4, deaths=deaths, folder=folder.replace("/shared", str(tmp_path)))
    check(job.results(), one)
    assert [len(job.workers(rank)) for rank in range(4)] == [2, 2, 2, 1]


def test_a_group_on_both_hosts_recovers_as_one(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """Three layers of 2, 4 and 2 blocks on four stages: the layer in the middle is on ranks 1 and 2."""
    deaths, layers = [Death(2, 0, "forward", 21), Death(1, 1, "forward", 30)], [2, 4, 2]
    one = run_ranks(f"{run.__module__}:run", 4, folder=str(tmp_path / "one"), deaths=[], layers=layers)
    job = Run(hosts, TORCHRUN, world=4, deaths=deaths, folder="recovery", layers=layers)
    check(job.results(), one)
    assert [len(job.workers(rank)) for rank in range(4)] == [1, 3, 3, 1]


def check(two: list[Result], one: list[Result]) -> None:
    """Compares everything that the ranks return."""
    assert different(merge([rank.state for rank in two]), merge([rank.state for rank in one])) == []
    for own, other in zip(two, one, strict=True):
        assert (own.losses, own.evaluated, own.drawn) == (other.losses, other.evaluated, other.drawn)
        assert torch.equal(own.all_losses, other.all_losses)


def stop(run: Run, lost: int) -> None:
    """The keeper of one rank is stopped."""
    os.kill(keeper(run, lost), signal.SIGSTOP)


def vanish(run: Run, lost: int) -> None:
    """All processes of a host are gone at once, without a word, since its link is down."""
    run.hosts[lost].run("ip", "link", "set", "link0", "down")
    os.killpg(run.processes[lost].pid, signal.SIGKILL)
    for process in (keeper(run, lost), *run.workers(lost)):
        os.kill(process, signal.SIGKILL)


def unplug(run: Run, lost: int) -> None:
    """The link is down, and all processes live."""
    run.hosts[lost].run("ip", "link", "set", "link0", "down")


def keeper(run: Run, rank: int) -> int:
    """Process of a rank's keeper."""
    process = parent_of(run.workers(rank)[-1])
    assert process is not None
    return process


@pytest.mark.parametrize("how", [stop, vanish, unplug])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_keeper_that_is_lost_ends_the_job_on_the_other_host(
    hosts: tuple[Host, Host], how: Callable[[Run, int], None], lost: int
) -> None:
    """It once took 300 s."""
    job = Run(hosts, DEEPSPEED, world=2, deaths=[Death(1, 0, "forward", 9, "wait")], folder="recovery")
    try:
        job.await_workers()
        time.sleep(5)
        how(job, lost)
        start, other = time.monotonic(), 1 - lost
        code = job.processes[other].wait(timeout=60)
        seconds = time.monotonic() - start
        text = job.logs[other].read_text()
        assert "takes its place" not in text, text[-3000:]
        assert code != 0 and seconds < 40, (seconds, text[-3000:])
        assert f"rank {lost} (node{lost}): not heard of for 20 s: the job ends" in text, text[-3000:]
        if how is not vanish:
            assert job.processes[lost].wait(timeout=30) != 0
        assert all(has_ended(process) for rank in range(2) for process in job.workers(rank))
    finally:
        for process in job.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
