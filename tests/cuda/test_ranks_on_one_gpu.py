"""Several ranks on one GPU leave the bits of one rank: a test of bits and order, not of time.

NCCL refuses two ranks on one device unless each claims to be another host, which its makers do not support: only with
``--ranks-share-gpu``. Where it refuses all the same, messages through pinned memory of the host show bits and order.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from tests import test_exactness as exactness
from tests.cuda.test_bits import on
from tests.support.engines import State, different, merge
from tests.support.host_memory import join_through_host_memory
from tests.support.ranks import run_ranks

CASES: list[tuple[str, dict[str, Any]]] = [
    *(("mlp", {"method": "streaming", "queue_depth": depth}) for depth in (1, 2, 4)),
    *((network, {"method": "streaming", "queue_depth": 2}) for network in ("vgg", "transformer")),
]


@pytest.fixture(autouse=True)
def _only_if_asked_for(request: pytest.FixtureRequest, device: str) -> None:
    if device == "cuda" and not request.config.option.ranks_share_gpu:
        pytest.skip("NCCL's makers do not support several ranks on one GPU: try it by --ranks-share-gpu")


def claim_a_host() -> None:
    """Lets NCCL take this rank for one of another host; before the first call of NCCL."""
    os.environ |= {
        "NCCL_HOSTID": f"rank{os.environ['RANK']}",
        "NCCL_SOCKET_IFNAME": "lo",
        "NCCL_IB_DISABLE": "1",
        "NCCL_MAX_CTAS": "1",  # a receive that is posted ahead occupies little of the GPU
        "NCCL_MULTI_RANK_GPU_ENABLE": "1",  # from NCCL 2.30 on
    }


def trained(through: str) -> list[State]:
    """Worker: states of this rank's layers, case after case."""
    if through == "nccl":
        claim_a_host()
    else:
        join_through_host_memory()
    torch.use_deterministic_algorithms(True, warn_only=True)
    states = [exactness.trained(network, [case])[0] for network, case in CASES]
    return [{name: value.cpu() for name, value in state.items()} for state in states]


@pytest.mark.cuda
@pytest.mark.distributed
@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("through", ["host memory", "nccl"])
def test_ranks_that_share_a_gpu_leave_the_bits_of_one(through: str, stages: int, device: str) -> None:
    options: dict[str, Any] = {"timeout": 150, "env": {**on(device), "LOCAL_RANK": "0"}}
    (alone,) = run_ranks(f"{__name__}:trained", 1, through=through, **options)
    ranks = run_ranks(f"{__name__}:trained", stages, through=through, **options)
    for number, case in enumerate(CASES):
        assert different(merge([rank[number] for rank in ranks]), alone[number]) == [], case
