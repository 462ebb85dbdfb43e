"""The store of a job is opened by its rank 0, unless a launcher has done so."""

from __future__ import annotations

import pytest

from ds_al.parallel import store
from tests.support.ranks import run_ranks


def joined() -> int:
    """Worker: the number of ranks that have met."""
    import torch.distributed as dist

    from ds_al.parallel.world import join_world

    join_world()
    return dist.get_world_size()


@pytest.mark.distributed
def test_a_job_that_a_rank_of_torchrun_has_started_opens_its_own_store() -> None:
    """It inherits torchrun's variable: all ranks waited for a store that nobody had opened."""
    inherited = {store.HOSTED: "True", "TORCHELASTIC_RESTART_COUNT": "0", "DS_AL_START_SECONDS": "20"}
    assert run_ranks(f"{__name__}:joined", 2, env=inherited) == [2, 2]
