"""Micro-batches of AG News for measurements, or random tokens of the same shape if the data set is unavailable."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ds_al.data.config import DataConfig
from ds_al.data.load import load_data
from ds_al.errors import ALDataError

CLASSES = 4
MicroBatch = tuple[tuple[Tensor, Tensor], Tensor]
"""``((ids (B, T) int64, mask (B, T) bool), labels (B,))``."""


@dataclass(frozen=True)
class Texts:
    """Micro-batches, and the data properties that the network needs."""

    micro_batches: tuple[MicroBatch, ...]
    vocab_size: int
    origin: str
    """Description of the data."""


def ag_news(
    path: str | None, *, count: int, micro_batch: int, length: int = 64, vocab_size: int = 10_000, seed: int = 0
) -> Texts:
    """Loads the first texts of a shuffled AG News, padded to one length.

    Args:
        path: folder of its parquet files; by default the ``datasets`` library's cache, or the hub.
        count: number of micro-batches.
        micro_batch: samples per micro-batch.
        length: tokens per text, T.
        vocab_size: maximum number of words.

    Returns:
        The texts, or random ids if the data set is unavailable; ``origin`` states which.

    Raises:
        ALDataError: ``path`` is given but contains no data set.
    """
    config = DataConfig(name="ag_news", path=path, vocab_size=vocab_size, max_length=length, padding="max_length")
    generator = torch.Generator().manual_seed(seed)
    try:
        splits = load_data(config, seed=seed)
    except ALDataError:
        if path is not None:
            raise
        return _generated(count, micro_batch, length, vocab_size, generator)
    order = torch.randperm(len(splits.train), generator=generator)[: count * micro_batch]
    return Texts(
        tuple(splits.train.make_batch(rows) for rows in order.split(micro_batch)),
        splits.vocab_size or vocab_size,
        f"AG News, {length} tokens",
    )


def _generated(count: int, micro_batch: int, length: int, vocab_size: int, generator: torch.Generator) -> Texts:
    def one() -> MicroBatch:
        ids = torch.randint(1, vocab_size, (micro_batch, length), generator=generator)
        return (ids, torch.ones_like(ids, dtype=torch.bool)), torch.randint(
            CLASSES, (micro_batch,), generator=generator
        )

    origin = f"generated tokens, {length} of them, since AG News is not at hand"
    return Texts(tuple(one() for _ in range(count)), vocab_size, origin)
