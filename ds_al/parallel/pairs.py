"""Process groups of two ranks: everything that one rank sends to another goes through a group of these two alone.

The two ranks make the group themselves, from the store in which all ranks met, so a connection can be made again while
all others live. Over NCCL such a group has a communicator and a stream of its own: a receive that is posted ahead does
not hold back the transfers of other groups.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from deepspeed import comm as dist
from torch.distributed import Store

from ds_al.errors import ALTransportError


def pair(name: str, peer: int, *, device: torch.device) -> Any:
    """Connects this rank with another one, and returns the process group of both. The lower rank is number 0 in it.

    Both ranks must call it equally often, and a rank that has several peers in the order of all its peers. Time-outs
    are those of the group of all ranks.

    Args:
        name: what the group carries; the same on both ranks.
        peer: global rank of the other end.
        device: device of the tensors to send: gloo sends those of the CPU, NCCL those of GPUs.

    Raises:
        ALTransportError: no backend sends tensors of this device.
    """
    me, world = dist.get_rank(), dist.get_world_group()
    low, high = sorted((me, peer))
    end = int(me == high)
    store = torch.distributed.PrefixStore(f"ds_al/{name}/{low}-{high}", world.get_group_store())
    generation = store.add(f"generation of {end}", 1)  # each end counts its own calls: both count the same
    timeout = world._get_backend(world._device_types[0]).options._timeout
    return connect(torch.distributed.PrefixStore(str(generation), store), end, device=device, timeout=timeout)


def connect(store: Store, end: int, *, device: torch.device, timeout: timedelta) -> Any:
    """Connects the two ends of a pair, and returns their process group; each end calls it once with the same store.

    Args:
        store: where the ends find each other.
        end: number of this end in the group, 0 or 1.
        device: as for :func:`pair`.
        timeout: of the connection, and of each transfer.

    Raises:
        ALTransportError: no backend sends tensors of this device.
    """
    if device.type == "cpu":
        return torch.distributed.ProcessGroupGloo(store, end, 2, timeout)
    if device.type != "cuda":
        raise ALTransportError(
            f"got the device {device}: expected cpu, whose tensors gloo sends, or cuda, whose tensors NCCL sends"
        )
    options = torch.distributed.ProcessGroupNCCL.Options()
    options._timeout = timeout
    group = torch.distributed.ProcessGroupNCCL(store, end, 2, options)
    group.eager_connect_single_device(device)  # else the first message would allocate, and so wait for the GPU
    return group
