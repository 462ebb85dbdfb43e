"""Micro-batches in an order that depends on nothing but the data set, the batch size and the seed.

No worker process and no global random state takes part, so any process can make the same stream, from any
position on: that is what makes runs comparable and a resume exact.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

from ds_al.errors import ALDataError

Collate = Callable[[list[Any]], Any]
"""A list of samples ``(x, y)`` to a micro-batch ``(x, y)``."""
Augment = Callable[[Tensor, torch.Generator], Tensor]
"""Changes the ``x`` of a micro-batch; draws from the given generator only."""


class SizedDataset(Protocol):
    """A map-style data set: what ``torch.utils.data.Dataset`` is with a ``__len__``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class ShuffledLoader:
    """An endless iterator of full micro-batches ``(x, y)``, shuffled anew in each epoch.

    The samples of an epoch that fill no micro-batch are left out of that epoch.

    Args:
        dataset: map-style, of samples ``(x, y)``. A ``TensorDataset`` is indexed once per micro-batch.
        batch_size: samples per micro-batch.
        seed: with the epoch it fixes the order, with the position the augmentation.
        collate_fn: makes a micro-batch of a list of samples; by default torch's ``default_collate``.
        augment: changes ``x`` of each micro-batch, with a generator of that micro-batch alone.

    Raises:
        ALDataError: the batch size is not positive, or the data set holds less than one micro-batch.
    """

    def __init__(
        self,
        dataset: SizedDataset,
        *,
        batch_size: int,
        seed: int,
        collate_fn: Collate | None = None,
        augment: Augment | None = None,
    ) -> None:
        _check(dataset, batch_size)
        if len(dataset) < batch_size:
            raise ALDataError(
                f"got a data set of {len(dataset)} samples: expected at least one micro-batch of {batch_size}"
                "; add samples, or lower the micro-batch size"
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.augment = augment
        self._fetch = _fetcher(dataset, collate_fn)
        self._position = 0
        self._order: tuple[int, Tensor] | None = None

    @property
    def batches_per_epoch(self) -> int:
        """Full micro-batches in one pass over the data set."""
        return len(self.dataset) // self.batch_size

    @property
    def position(self) -> int:
        """Micro-batches handed out since the start of the first epoch."""
        return self._position

    @property
    def epoch(self) -> int:
        """Epoch of the next micro-batch, from 0."""
        return self._position // self.batches_per_epoch

    def seek(self, position: int) -> None:
        """Continues with the micro-batch that follows the first ``position`` ones.

        Raises:
            ALDataError: the position is negative.
        """
        if position < 0:
            raise ALDataError(f"got position {position}: expected 0 or more, the number of micro-batches to skip")
        self._position = position

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        epoch, batch = divmod(self._position, self.batches_per_epoch)
        first = batch * self.batch_size
        x, y = self._fetch(self._permutation(epoch)[first : first + self.batch_size])
        if self.augment is not None:
            x = self.augment(x, _generator(self.seed, self._position, stream="augment"))
        self._position += 1
        return x, y

    def _permutation(self, epoch: int) -> Tensor:
        if self._order is None or self._order[0] != epoch:
            generator = _generator(self.seed, epoch, stream="order")
            self._order = epoch, torch.randperm(len(self.dataset), generator=generator)
        return self._order[1]


class OrderedBatches:
    """One pass over a data set in its own order; can be iterated again. The last micro-batch may be smaller.

    Args and errors are those of :class:`ShuffledLoader`; a single sample is enough.
    """

    def __init__(self, dataset: SizedDataset, *, batch_size: int, collate_fn: Collate | None = None) -> None:
        _check(dataset, batch_size)
        self.dataset = dataset
        self.batch_size = batch_size
        self._fetch = _fetcher(dataset, collate_fn)

    def __len__(self) -> int:
        return math.ceil(len(self.dataset) / self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        for indices in torch.arange(len(self.dataset)).split(self.batch_size):
            yield self._fetch(indices)


def ordered_batches(dataset: SizedDataset, *, batch_size: int, collate_fn: Collate | None = None) -> OrderedBatches:
    """Micro-batches ``(x, y)`` of one pass in order, for evaluation; see :class:`OrderedBatches`."""
    return OrderedBatches(dataset, batch_size=batch_size, collate_fn=collate_fn)


def _check(dataset: SizedDataset, batch_size: int) -> None:
    if batch_size < 1:
        raise ALDataError(f"got batch_size={batch_size}: expected 1 or more")
    if not len(dataset):
        raise ALDataError("got an empty data set: expected at least one sample")


def _fetcher(dataset: SizedDataset, collate_fn: Collate | None) -> Callable[[Tensor], Any]:
    """The quickest way from a tensor of indices to a micro-batch of this data set."""
    if isinstance(dataset, TensorDataset) and collate_fn is None:
        return lambda indices: tuple(tensor[indices] for tensor in dataset.tensors)
    collate = collate_fn or default_collate
    if hasattr(dataset, "__getitems__"):
        return lambda indices: collate(dataset.__getitems__(indices.tolist()))
    return lambda indices: collate([dataset[index] for index in indices.tolist()])


def _generator(seed: int, number: int, *, stream: str) -> torch.Generator:
    """A generator of its own for each (seed, number, stream); hashed, since neighbouring seeds are alike."""
    digest = hashlib.blake2b(f"{stream} {seed} {number}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
