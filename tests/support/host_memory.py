"""Messages of a GPU over gloo, through pinned memory of the host: for ranks that share a GPU where NCCL refuses them.

::

    buffer on the device ---> pinned copy ---> gloo ---> pinned copy ---> buffer on the device

The host waits for the device before each message, so this shows bits and order, and no time. DeepSpeed's engine sends a
number to its neighbour when it is made, which takes the same way. Collectives are gloo's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from torch import Tensor

from ds_al.parallel import pairs, store


class HostMemoryGroup:
    """The part of a process group that channels use.

    Args:
        group: of two ranks, over gloo.
    """

    def __init__(self, group: Any) -> None:
        self._group = group

    def rank(self) -> int:
        """Number of this end."""
        number: int = self._group.rank()
        return number

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> _Transfer:
        """Copies tensors to the host, and begins to send them."""
        held = [on_host(tensor) for tensor in tensors]
        return _Transfer(self._group.send(held, peer, tag), held, [])

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> _Transfer:
        """Begins to receive tensors; they are there once the transfer was waited for."""
        held = [like_on_host(tensor) for tensor in tensors]
        return _Transfer(self._group.recv(held, peer, tag), held, tensors)


class _Transfer:
    """A transfer that has begun, and the memory of the host that it needs."""

    def __init__(self, work: Any, held: list[Tensor], into: list[Tensor]) -> None:
        self._work, self._held, self._into = work, held, into

    def wait(self) -> None:
        """Waits until it is complete."""
        self._work.wait()
        for tensor, held in zip(self._into, self._held, strict=False):
            tensor.copy_(held, non_blocking=True)


def like_on_host(tensor: Tensor) -> Tensor:
    """Memory of the host for a tensor, pinned where the tensor is on a GPU."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


def on_host(tensor: Tensor) -> Tensor:
    """A copy of a tensor on the host, for which the host waits."""
    return like_on_host(tensor).copy_(tensor)


def join_through_host_memory() -> None:
    """Joins all ranks over gloo, whatever the accelerator, and lets all messages pass the host from now on.

    The group of all ranks is torch's own, without a device bound to it: gloo would be asked to split for each group.
    """
    with store.hosted_here():
        torch.distributed.init_process_group("gloo")
    deepspeed.init_distributed(dist_backend="gloo")
    _patch_pairs()
    _patch_first_message()


def _patch_pairs() -> None:
    over_gloo = pairs.connect

    def connect(*ends: Any, device: torch.device, **options: Any) -> HostMemoryGroup:
        return HostMemoryGroup(over_gloo(*ends, device=torch.device("cpu"), **options))

    pairs.connect = connect


def _patch_first_message() -> None:
    from deepspeed.runtime.pipe import p2p

    def through_host(transfer: Callable[..., Any]) -> Callable[[Tensor, int], None]:
        def passed(tensor: Tensor, stage: int) -> None:
            held = on_host(tensor)
            transfer(held, stage)
            tensor.copy_(held)

        return passed

    p2p.send, p2p.recv = through_host(p2p.send), through_host(p2p.recv)
