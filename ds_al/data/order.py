"""In which order an epoch takes the samples: a function of data, batch size, seed and epoch alone."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

WINDOW = 50
"""Micro-batches' worth of shuffled samples that are sorted by length together."""


def generator(seed: int, number: int, *, stream: str) -> torch.Generator:
    """A generator of its own for each (seed, number, stream); hashed, since neighbouring seeds are alike."""
    digest = hashlib.blake2b(f"{stream} {seed} {number}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def shuffled(count: int, *, seed: int, epoch: int) -> Tensor:
    """All samples ``(count,)`` in an order drawn evenly."""
    return torch.randperm(count, generator=generator(seed, epoch, stream="order"))


def bucketed(lengths: Tensor, *, batch_size: int, seed: int, epoch: int, window: int = WINDOW) -> Tensor:
    """All samples ``(N,)`` in an order whose micro-batches hold samples alike in length.

    Samples are shuffled, then sorted by length within each window, then the full micro-batches are shuffled,
    so that short ones do not come first. The samples that fill no micro-batch come last; since samples were
    shuffled first, they are others in each epoch.

    Args:
        lengths: of each sample ``(N,)``.
        batch_size: samples per micro-batch.
        seed, epoch: decide the order.
        window: micro-batches that are sorted together; more of them waste less padding and mix less.
    """
    draw = generator(seed, epoch, stream="order")
    order = torch.randperm(len(lengths), generator=draw)
    full = len(order) // batch_size * batch_size
    kept, rest = order[:full], order[full:]
    # Equal lengths stay in shuffled order: a stable sort.
    windows = [part[lengths[part].argsort(stable=True)] for part in kept.split(window * batch_size)]
    batches = torch.cat(windows).view(-1, batch_size) if windows else kept.view(0, batch_size)
    return torch.cat([batches[torch.randperm(len(batches), generator=draw)].flatten(), rest])
