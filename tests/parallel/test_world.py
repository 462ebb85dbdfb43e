"""Ranks leave no shared memory behind: 66 MiB a rank and run once filled the memory of a machine that ran the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.engines import SEED
from tests.support.networks import NETWORKS
from tests.support.ranks import ROOT, RankFailure, run_ranks

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm on this machine"),
]

ONE_MACHINE = {"LOCAL_SIZE": "2"}  # as the deepspeed command sets it: only then are there buffers


def named(port: str) -> list[str]:
    return [path.name for path in Path("/dev/shm").glob(f"deepspeed_*_{port}_*")]


def joined() -> tuple[list[str], int]:
    """Worker: the buffers of this world that have a name, and how many are open in this process."""
    import ds_al

    ds_al.ALPipelineModule(NETWORKS["mlp"].layers(), num_classes=4, base_seed=SEED)
    maps = Path("/proc/self/maps").read_text().splitlines()
    return named(os.environ["MASTER_PORT"]), sum("deepspeed_allreduce_buffer" in line for line in maps)


def test_buffers_lose_their_names_when_all_ranks_have_them_open() -> None:
    for names, opened in run_ranks(f"{__name__}:joined", 2, env=ONE_MACHINE):
        assert names == []
        assert opened == 2


ALONE = """
import os
import torch.distributed as dist
import ds_al
from ds_al.parallel.world import join_world
join_world()
print(dist.get_rank(), dist.get_world_size())
"""


def test_a_process_that_nothing_launched_is_a_world_of_its_own(tmp_path: Path) -> None:
    """DeepSpeed looked for MPI there, and failed without it."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", ALONE], env=environment, cwd=tmp_path, text=True, capture_output=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "0 1"


def fails_early() -> None:
    """Worker: joins by DeepSpeed alone, which names its buffers, and fails."""
    import deepspeed

    deepspeed.init_distributed()
    port = os.environ["MASTER_PORT"]
    raise RuntimeError(f"port {port} buffers {len(named(port))}.")


def test_nothing_stays_of_ranks_that_fail() -> None:
    with pytest.raises(RankFailure, match=r"port \d+ buffers [12]\.") as caught:
        run_ranks(f"{__name__}:fails_early", 2, env=ONE_MACHINE)
    port = str(caught.value).split("RuntimeError: port ")[1].split()[0]
    assert named(port) == []
