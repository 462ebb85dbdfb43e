"""Order of the samples in an epoch, as a function of data, batch size, seed and epoch alone."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

WINDOW = 50
"""Number of micro-batches whose samples are sorted by length together."""


def generator(seed: int, number: int, *, stream: str) -> torch.Generator:
    """Returns a generator per (seed, number, stream); hashed, since similar seeds produce similar numbers."""
    digest = hashlib.blake2b(f"{stream} {seed} {number}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def shuffled(count: int, *, seed: int, epoch: int) -> Tensor:
    """Returns all samples ``(count,)`` in a uniformly random order."""
    return torch.randperm(count, generator=generator(seed, epoch, stream="order"))


def bucketed(lengths: Tensor, *, batch_size: int, seed: int, epoch: int, window: int = WINDOW) -> Tensor:
    """Returns all samples ``(N,)`` in an order in which micro-batches have samples of similar length.

    Samples are shuffled, then sorted by length within each window, then the full micro-batches are shuffled, so that
    short ones are not first. The samples that do not fill a micro-batch are last; they differ from epoch to epoch,
    since samples are shuffled first.

    Args:
        lengths: length of each sample ``(N,)``.
        batch_size: samples per micro-batch.
        seed, epoch: determine the order.
        window: number of micro-batches that are sorted together; a larger window needs less padding and shuffles less.
    """
    draw = generator(seed, epoch, stream="order")
    order = torch.randperm(len(lengths), generator=draw)
    full = len(order) // batch_size * batch_size
    kept, rest = order[:full], order[full:]
    # A stable sort keeps equal lengths in shuffled order.
    windows = [part[lengths[part].argsort(stable=True)] for part in kept.split(window * batch_size)]
    batches = torch.cat(windows).view(-1, batch_size) if windows else kept.view(0, batch_size)
    return torch.cat([batches[torch.randperm(len(batches), generator=draw)].flatten(), rest])
