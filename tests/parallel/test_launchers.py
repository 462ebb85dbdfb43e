"""Which variables launch a rank, and which do not."""

from __future__ import annotations

import os
import sys

import pytest
from deepspeed.launcher.runner import encode_world_info

from ds_al.errors import ALConfigError
from ds_al.parallel import launchers
from ds_al.parallel.launchers import first_node, launched, launcher_processes, planned_hosts

SLURM = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2"}
SLURM |= {"SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_JOB_ID": "1002"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"MASTER_PORT": "29500"},
        {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"},
        {"LOCAL_RANK": "3"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"},  # a batch script, without srun
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        {"PMI_RANK": "0", "PMI_SIZE": "1"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
    ],
)
def test_what_a_shell_may_hold_launches_nothing(environment: dict[str, str]) -> None:
    found = {**environment, **launched(environment)}
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"], found["MASTER_ADDR"]) == (
        "0",
        "1",
        "0",
        "127.0.0.1",
    )
    assert found["MASTER_PORT"] != "29500"


def test_what_a_launcher_has_set_stays() -> None:
    environment = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "5", "SLURM_PROCID": "7"}
    assert launched(environment) == {"LOCAL_RANK": "1"}
    assert launched({"RANK": "0", "WORLD_SIZE": "1"})["MASTER_PORT"] == "29500"
    with pytest.raises(ALConfigError, match="LOCAL_RANK is not: set it to the number of this rank on its own host"):
        launched({**environment, "MASTER_ADDR": "10.0.0.1"})


def test_tasks_of_srun_find_each_other() -> None:
    assert launched(SLURM, port=29500) == {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu03", "MASTER_PORT": "29502"
    }  # fmt: skip
    assert launched({**SLURM, "SLURM_STEP_NUM_NODES": "1"})["MASTER_ADDR"] == "127.0.0.1"
    assert "MASTER_ADDR" not in launched({**SLURM, "MASTER_ADDR": "login"})


def test_mpirun_on_one_host_needs_no_mpi4py_and_on_several_is_left_to_deepspeed() -> None:
    open_mpi = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
    open_mpi |= {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    found = launched(open_mpi)
    assert (found["RANK"], found["WORLD_SIZE"], found["MASTER_ADDR"]) == ("1", "2", "127.0.0.1")
    assert launched({**open_mpi, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}) == {}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[03-07,12],cpu1", "gpu03"),
        ("rack-2-gpu[8,9]", "rack-2-gpu8"),
        ("a[1-2]-ib", "a1-ib"),
    ],
)
def test_the_first_node_of_a_list_of_slurm(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_a_shell_or_a_test_runner_is_no_launcher() -> None:
    assert os.getppid() and sys.argv
    assert launcher_processes() == []


def test_the_planned_hosts_are_those_of_the_hostfile(monkeypatch: pytest.MonkeyPatch) -> None:
    info = encode_world_info({"node0": [0, 1], "node1": [0]})
    command = f"python -u -m deepspeed.launcher.launch --world_info={info} --node_rank=1 --master_addr=node0 train.py"
    monkeypatch.setattr(launchers, "launcher_processes", lambda: [(7, 8)])
    monkeypatch.setattr(launchers, "_command", lambda process: command)
    assert planned_hosts() == ["node0", "node0", "node1"]
    monkeypatch.setattr(launchers, "_command", lambda process: "torchrun train.py")
    assert planned_hosts() == []
