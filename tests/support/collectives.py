"""Which ranks meet in collective calls: what would make stages wait for each other."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

_NAMES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_reduce_coalesced",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "monitored_barrier",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
)


@contextmanager
def collectives() -> Iterator[set[tuple[int, ...]]]:
    """The ranks of the groups whose collectives this rank calls, DeepSpeed's and torch's, while the context is open."""
    seen: set[tuple[int, ...]] = set()

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def called(*args: Any, **kwargs: Any) -> Any:
            groups = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, torch.distributed.ProcessGroup)]
            ranks = torch.distributed.get_process_group_ranks(groups[0] if groups else None)
            seen.add(tuple(sorted(ranks)))
            return call(*args, **kwargs)

        return called

    with pytest.MonkeyPatch.context() as patch:
        for name in _NAMES:
            for module in (torch.distributed, torch.distributed.distributed_c10d):
                patch.setattr(module, name, watched(getattr(module, name)))
        yield seen
