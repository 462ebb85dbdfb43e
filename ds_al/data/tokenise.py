"""Tokenization of texts, done once and cached by table, tokenizer and options."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import torch
from torch import Tensor

from ds_al.data import cache, hub
from ds_al.data.words import Words
from ds_al.errors import ALDataError

_BATCH = 1000
"""Texts that are read and encoded at a time."""


class Tokenizer(Protocol):
    """Converts texts to token ids."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""

    @property
    def padding_id(self) -> int:
        """Id of the padding token."""

    @property
    def fingerprint(self) -> str:
        """Identifies the mapping from texts to tokens."""

    def encode(self, texts: list[str], *, max_length: int) -> list[list[int]]:
        """Returns the token ids of each text, at most ``max_length`` of them."""


class Pretrained:
    """A tokenizer of ``transformers``, with its special tokens. If it has no padding token, its end of text is used.

    Args:
        name: name on the hub, or a folder.

    Raises:
        ALDataError: the tokenizer is not found.
    """

    def __init__(self, name: str) -> None:
        self._tokenizer: Any = hub.tokenizer(name)
        self._tokenizer.model_max_length = int(1e9)  # suppresses warnings about truncated texts

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return len(self._tokenizer)

    @property
    def padding_id(self) -> int:
        """Id of the padding token, or else of the end of text, which then only the mask distinguishes from padding."""
        for token in (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

    @property
    def fingerprint(self) -> str:
        """Hash of the vocabulary and of a tokenized sentence, so that a copy of the folder has the same one."""
        vocabulary = sorted(self._tokenizer.get_vocab().items(), key=lambda entry: entry[1])
        probe = self._tokenizer("The quick, brown FOX naïvely jumps; 42 times!")["input_ids"]
        return hashlib.blake2b(repr((vocabulary, probe)).encode(), digest_size=8).hexdigest()

    def encode(self, texts: list[str], *, max_length: int) -> list[list[int]]:
        """Returns the token ids of each text, including special tokens."""
        return self._tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]


def tokenise(
    table: datasets.Dataset,
    column: str,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    folder: Path,
    place: Callable[[int], str],
) -> tuple[Tensor, Tensor]:
    """Tokenizes all texts of a table, and concatenates their tokens.

    Args:
        table: table with a column of texts; a missing text is treated as empty.
        column: name of that column.
        tokenizer: converts texts to ids.
        max_length: maximum number of tokens of a text.
        folder: cache of tokens.
        place: where a row is, for errors.

    Returns:
        ``(flat (sum of lengths,) int32, lengths (N,) int64)``.

    Raises:
        ALDataError: a text is not UTF-8, or the tokenizer fails, or returns an id that it has not.
    """

    def make() -> cache.Arrays:
        ids = [row for batch in texts(table, column, place) for row in _encode(tokenizer, batch, max_length=max_length)]
        flat = np.fromiter(itertools.chain.from_iterable(ids), dtype=np.int32)
        if len(flat) and not 0 <= flat.min() <= flat.max() < tokenizer.vocab_size:
            raise ALDataError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, and returned ids from {flat.min()} to {flat.max()}: "
                "expected ids below their number; repair it, or choose another by experiment.data.tokenizer"
            )
        return {"flat": flat, "lengths": np.array([len(row) for row in ids], dtype=np.int64)}

    found = cache.kept(folder, cache.key_of("tokens", table, column, tokenizer.fingerprint, max_length), make)
    return torch.from_numpy(found["flat"]), torch.from_numpy(found["lengths"])


def texts(table: datasets.Dataset, column: str, place: Callable[[int], str]) -> Iterator[list[str]]:
    """Yields the texts of a table in batches; a missing text is an empty one.

    Raises:
        ALDataError: a text is not UTF-8; the message names its row.
    """
    table = table.select_columns([column])
    for start in range(0, len(table), _BATCH):
        try:
            batch = table[start : start + _BATCH][column]
        except UnicodeDecodeError:
            raise _undecodable(table, column, start, place) from None
        yield [text or "" for text in batch]


def _undecodable(table: datasets.Dataset, column: str, start: int, place: Callable[[int], str]) -> ALDataError:
    """Finds the first text of a batch that is not UTF-8."""
    for row in range(start, len(table)):
        try:
            table[row]
        except UnicodeDecodeError as error:
            return ALDataError(
                f"column {column!r} in {place(row)} is not UTF-8 ({error}): write the file anew as UTF-8"
            )
    raise AssertionError("all texts are UTF-8")


def _encode(tokenizer: Tokenizer, batch: list[str], *, max_length: int) -> list[list[int]]:
    try:
        return tokenizer.encode(batch, max_length=max_length)
    except Exception as error:  # of a tokenizer that is not ours
        raise ALDataError(
            f"the tokenizer cannot encode the texts ({type(error).__name__}: {error}): repair it, or choose another by "
            "experiment.data.tokenizer"
        ) from error


def vocabulary(
    table: datasets.Dataset, column: str, rows: Tensor, *, size: int, folder: Path, place: Callable[[int], str]
) -> Words:
    """Builds the vocabulary of some rows of a table, or loads it from the cache.

    Args:
        table: table with a column of texts.
        column: name of that column.
        rows: training rows ``(N,)``.
        size: maximum number of tokens.
        folder: cache of vocabularies.
        place: where a row of the table is, for errors.
    """

    def make() -> cache.Arrays:
        chosen = texts(table.select(rows.numpy()), column, lambda row: place(int(rows[row])))
        words = Words.build(itertools.chain.from_iterable(chosen), size=size)
        return {"words": np.frombuffer(json.dumps(words.vocabulary).encode(), dtype=np.uint8)}

    drawn = hashlib.blake2b(rows.numpy().tobytes(), digest_size=16).hexdigest()
    found = cache.kept(folder, cache.key_of("words", table, column, drawn, size), make)
    return Words(json.loads(found["words"].tobytes()))
