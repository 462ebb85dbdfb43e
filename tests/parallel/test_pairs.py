"""Groups of two ranks: they know each other, live and end apart, and are made again by their two ranks alone."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ds_al.errors import ALTransportError
from ds_al.parallel.pairs import pair
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed
CPU = torch.device("cpu")


def sent(group: Any, number: int) -> int:
    """The number that the lower rank of a group sends to the other one."""
    message: Tensor = torch.tensor([number if group.rank() == 0 else -1])
    (group.send if group.rank() == 0 else group.recv)([message], 1 - group.rank(), 0).wait()
    return int(message)


def remade() -> dict[str, Any]:
    """Worker: 0 --- 1 --- 2, whose first border is made again while the second one is in use."""
    deepspeed.init_distributed(timeout=timedelta(seconds=77))
    rank = dist.get_rank()
    groups = {
        (low, high): pair("test", high + low - rank, device=CPU)
        for low, high in ((0, 1), (1, 2))
        if rank in (low, high)
    }
    other = {border: pair("other", sum(border) - rank, device=CPU) for border in groups}
    found = {"first": {border: sent(group, 10 + border[0]) for border, group in groups.items()}}
    if rank < 2:
        groups[0, 1].shutdown()
        groups[0, 1] = pair("test", 1 - rank, device=CPU)
    found["again"] = {border: sent(group, 20 + border[0]) for border, group in groups.items()}
    found["other"] = {border: sent(group, 30 + border[0]) for border, group in other.items()}
    found["seconds"] = {group.options._timeout.total_seconds() for group in groups.values()}
    with pytest.raises(ALTransportError, match=r"got the device meta: expected cpu.*or cuda"):
        pair(f"{rank}", 1 - rank, device=torch.device("meta"))
    return found


def test_a_pair_is_made_again_while_others_live_and_has_the_time_out_of_the_job() -> None:
    for rank, found in enumerate(run_ranks(f"{__name__}:remade", 3)):
        borders = [border for border in ((0, 1), (1, 2)) if rank in border]
        for name, tens in (("first", 10), ("again", 20), ("other", 30)):
            assert found[name] == {border: tens + border[0] for border in borders}
        assert found["seconds"] == {77.0}
