"""Data loaders with an order that depends only on the data set, the batch size and the seed.

The loaders use no worker process and no global random state, so any process can produce the same stream from any
position on: runs are comparable, and a resume is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

from ds_al.data.augment import Augment
from ds_al.data.order import bucketed, generator, shuffled
from ds_al.data.prefetch import Prefetcher
from ds_al.errors import ALConfigError, ALDataError

Collate = Callable[[list[Any]], Any]
"""Collates a list of samples ``(x, y)`` to a micro-batch ``(x, y)``."""
Fetch = Callable[[Tensor, Callable[[Tensor], Tensor] | None], tuple[Any, Any]]
"""Builds a micro-batch ``(x, y)`` from indices ``(B,)`` and an augmentation of x."""


class SizedDataset(Protocol):
    """A map-style data set: ``torch.utils.data.Dataset`` with a ``__len__``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class ShuffledLoader:
    """An endless iterator of full micro-batches ``(x, y)``, reshuffled in each epoch.

    The samples of an epoch that do not fill a micro-batch are dropped in that epoch.

    Example:
        >>> samples = torch.utils.data.TensorDataset(torch.arange(10), torch.arange(10))
        >>> loader = ds_al.data.ShuffledLoader(samples, batch_size=4, seed=0)
        >>> loader.batches_per_epoch, len(next(loader)[0])
        (2, 4)

    Args:
        dataset: map-style, of samples ``(x, y)``. A ``TensorDataset``, or one with a method ``make_batch`` like that of
            :class:`~ds_al.data.splits.Part`, is indexed once per micro-batch.
        batch_size: samples per micro-batch.
        seed: seed; with the epoch it determines the order, with the position the augmentation.
        collate_fn: collates a list of samples to a micro-batch; by default torch's ``default_collate``.
        augment: augments ``x`` of each micro-batch, with a generator of its own.
        lengths: length of each sample ``(N,)``; if given, micro-batches have samples of similar length.
        share: ``(r, R)``: replica r of R receives number r of every R micro-batches. The replicas together receive the
            micro-batches of one loader without a share.
        prefetch: number of micro-batches that a thread prepares ahead of time; 0 prepares each one on request. The data
            set, ``collate_fn`` and ``augment`` are then used in that thread.

    Raises:
        ALDataError: the batch size is not positive, the data set has less than one micro-batch, or the number of
            lengths differs from that of samples.
    """

    def __init__(
        self,
        dataset: SizedDataset,
        *,
        batch_size: int,
        seed: int,
        collate_fn: Collate | None = None,
        augment: Augment | None = None,
        lengths: Tensor | None = None,
        share: tuple[int, int] = (0, 1),
        prefetch: int = 0,
    ) -> None:
        _check(dataset, batch_size)
        if len(dataset) < batch_size:
            raise ALDataError(
                f"got a data set of {len(dataset)} samples: expected at least one micro-batch of {batch_size}"
                "; add samples, or lower the micro-batch size"
            )
        if lengths is not None and len(lengths) != len(dataset):
            raise ALDataError(f"got {len(lengths)} lengths of {len(dataset)} samples: expected one of each")
        if not 0 <= share[0] < share[1]:
            raise ALDataError(f"got share={share}: expected (r, R) with r in 0..R-1")
        if prefetch < 0:
            raise ALDataError(f"got prefetch={prefetch}: expected 0 or more micro-batches to keep ready")
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.augment = augment
        self.share = share
        fetch = _fetcher(dataset, collate_fn)
        self._stream = _Stream(fetch, len(dataset), batch_size, seed, augment, lengths, share)
        self._prefetcher = Prefetcher(self._stream.batch, depth=prefetch) if prefetch else None
        self._position = 0

    @property
    def batches_per_epoch(self) -> int:
        """Number of full micro-batches in one pass over the data set."""
        return self._stream.batches_per_epoch

    @property
    def position(self) -> int:
        """Number of micro-batches returned since the start of the first epoch."""
        return self._position

    @property
    def epoch(self) -> int:
        """Epoch of the next micro-batch, from 0."""
        return self._position * self.share[1] // self.batches_per_epoch

    def seek(self, position: int) -> None:
        """Continues after the first ``position`` micro-batches.

        Raises:
            ALDataError: the position is negative.
        """
        if position < 0:
            raise ALDataError(f"got position {position}: expected 0 or more, the number of micro-batches to skip")
        self._position = position

    def close(self) -> None:
        """Ends the prefetching thread, if there is one; the next micro-batch restarts it."""
        if self._prefetcher is not None:
            self._prefetcher.close()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        get = self._stream.batch if self._prefetcher is None else self._prefetcher.get
        batch = get(self._position)
        self._position += 1
        return batch


class _Stream:
    """Builds micro-batches by position; separate from the loader, so that the prefetching thread has no reference to
    it."""

    def __init__(
        self,
        fetch: Fetch,
        count: int,
        batch_size: int,
        seed: int,
        augment: Augment | None,
        lengths: Tensor | None,
        share: tuple[int, int],
    ) -> None:
        self.fetch, self.count, self.batch_size, self.seed = fetch, count, batch_size, seed
        self.augment, self.lengths, self.share = augment, lengths, share
        self.batches_per_epoch = count // batch_size
        self._order: tuple[int, Tensor] | None = None

    def batch(self, position: int) -> tuple[Any, Any]:
        index, count = self.share
        position = position * count + index
        epoch, number = divmod(position, self.batches_per_epoch)
        first = number * self.batch_size
        indices = self._permutation(epoch)[first : first + self.batch_size]
        augment = self.augment
        if augment is None:
            return self.fetch(indices, None)
        draw = generator(self.seed, position, stream="augment")
        return self.fetch(indices, lambda x: augment(x, draw))

    def _permutation(self, epoch: int) -> Tensor:
        if self._order is None or self._order[0] != epoch:
            common = {"seed": self.seed, "epoch": epoch}
            if self.lengths is None:
                self._order = epoch, shuffled(self.count, **common)
            else:
                self._order = epoch, bucketed(self.lengths, batch_size=self.batch_size, **common)
        return self._order[1]


class OrderedBatches:
    """Iterates over a data set in its own order, any number of times. The last micro-batch may be smaller.

    Arguments and errors are those of :class:`ShuffledLoader`; one sample is enough.
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
            yield self._fetch(indices, None)


def ordered_batches(dataset: SizedDataset, *, batch_size: int, collate_fn: Collate | None = None) -> OrderedBatches:
    """Returns the micro-batches ``(x, y)`` of one pass in order, for evaluation; see :class:`OrderedBatches`."""
    return OrderedBatches(dataset, batch_size=batch_size, collate_fn=collate_fn)


def loader_of(
    data: Any, *, batch_size: int, seed: int, collate_fn: Collate | None, share: tuple[int, int]
) -> ShuffledLoader:
    """Returns the loader of a user's training data: the user's own :class:`ShuffledLoader`, or a new one of the data
    set.

    Args:
        share: index of this data parallel replica, and number of replicas.

    Raises:
        ALConfigError: the user's loader has another share.
    """
    if not isinstance(data, ShuffledLoader):
        return ShuffledLoader(data, batch_size=batch_size, seed=seed, collate_fn=collate_fn, share=share)
    if data.share != share:
        raise ALConfigError(
            f"got a ShuffledLoader with share={data.share}: expected {share}, or every replica of the pipeline would "
            "train on the same samples"
        )
    return data


def _check(dataset: SizedDataset, batch_size: int) -> None:
    if batch_size < 1:
        raise ALDataError(f"got batch_size={batch_size}: expected 1 or more")
    if not len(dataset):
        raise ALDataError("got an empty data set: expected at least one sample")


def _fetcher(dataset: SizedDataset, collate_fn: Collate | None) -> Fetch:
    """Returns the fastest function that builds a micro-batch of this data set from a tensor of indices."""
    if collate_fn is None and hasattr(dataset, "make_batch"):
        return dataset.make_batch
    if collate_fn is None and isinstance(dataset, TensorDataset):
        tensors = dataset.tensors
        return _augmented(lambda indices: tuple(tensor[indices] for tensor in tensors))
    collate = collate_fn or default_collate
    if hasattr(dataset, "__getitems__"):
        return _augmented(lambda indices: collate(dataset.__getitems__(indices.tolist())))
    return _augmented(lambda indices: collate([dataset[index] for index in indices.tolist()]))


def _augmented(fetch: Callable[[Tensor], Any]) -> Fetch:
    """Adds the augmentation of x to a function that builds micro-batches."""

    def both(indices: Tensor, augment: Callable[[Tensor], Tensor] | None) -> Any:
        if augment is None:
            return fetch(indices)
        x, y = fetch(indices)
        return augment(x), y

    return both
