"""Texts of a data set as micro-batches, tokenized by the tokenizer of the pretrained folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_al.data.config import DataConfig
from ds_al.data.load import load_data
from ds_al.data.splits import Part, Splits


@dataclass(frozen=True)
class Source:
    """A data set of the study.

    Attributes:
        folder: its folder, below the root of all data.
        length: tokens of a text, T; longer ones are cut.
        title: what it is.
    """

    folder: str
    length: int
    title: str


SOURCES = {
    "ag-news": Source("ag-news", 64, "AG News: 4 kinds of news, 64 tokens"),
    "imdb": Source("imdb-small", 128, "IMDB: 2 sentiments of reviews, 128 tokens"),
    "imdb-short": Source("imdb-small", 32, "IMDB, the first 32 tokens: sentiment of a sentence or two, as in SST-2"),
    "sst2": Source("sst2", 64, "SST-2: 2 sentiments of sentences, 64 tokens"),
}
"""Data sets by name."""


def load_texts(name: str, *, root: Path, pretrained: Path, cache: str | None = None) -> Splits:
    """Reads and tokenizes a data set; a tenth of its training texts is for validation.

    Args:
        name: a key of :data:`SOURCES`.
        root: folder of the data sets.
        pretrained: folder with the tokenizer.
        cache: cache folder of tokens.

    Raises:
        ALDataError: the data set or the tokenizer is not there.
    """
    source = SOURCES[name]
    config = DataConfig(
        name=name,
        path=str(root / source.folder),
        tokenizer=str(pretrained),
        max_length=source.length,
        padding="longest",
        cache=cache,
    )
    return load_data(config, seed=0)


def micro_batches(part: Part, *, size: int, seed: int) -> Iterator[tuple[Any, Tensor]]:
    """Yields micro-batches ``((ids, mask), labels)`` endlessly, each epoch in a new order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(part), generator=generator)
        for start in range(0, len(part) - size + 1, size):
            yield part.make_batch(order[start : start + size])


def held_out(part: Part, *, count: int, size: int) -> list[tuple[Any, Tensor]]:
    """Returns the same ``count`` texts of a part for every run, drawn once."""
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(0))[:count]
    return [part.make_batch(rows) for rows in order.split(size)]
