"""Tokenization of texts, done once and cached as an Arrow file by table, tokenizer and options."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import torch
from torch import Tensor

from ds_al.data import hub
from ds_al.data.cache import key_of
from ds_al.data.words import Words


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
    table: datasets.Dataset, column: str, tokenizer: Tokenizer, *, max_length: int, folder: Path
) -> tuple[Tensor, Tensor]:
    """Tokenizes all texts of a table, and concatenates their tokens.

    Args:
        table: table with a column of texts; a missing text is treated as empty.
        column: name of that column.
        tokenizer: converts texts to ids.
        max_length: maximum number of tokens of a text.
        folder: cache of tokens.

    Returns:
        ``(flat (sum of lengths,) int32, lengths (N,) int64)``.
    """
    key = key_of("tokens", table, column, tokenizer.fingerprint, max_length)
    folder.mkdir(parents=True, exist_ok=True)

    def encode(texts: list[str | None]) -> dict[str, list[list[int]]]:
        return {"ids": tokenizer.encode([text or "" for text in texts], max_length=max_length)}

    with hub.no_progress_bars():
        tokens = table.map(
            encode,
            batched=True,
            input_columns=[column],
            remove_columns=table.column_names,
            features=datasets.Features({"ids": datasets.List(datasets.Value("int32"))}),
            cache_file_name=os.fspath(folder / f"{key}.arrow"),
            new_fingerprint=key,
        )
    lists = tokens.data.column("ids").combine_chunks()
    flat = np.array(lists.flatten().to_numpy(zero_copy_only=False), dtype=np.int32)
    lengths = np.diff(lists.offsets.to_numpy()).astype(np.int64)
    return torch.from_numpy(flat), torch.from_numpy(lengths)


def vocabulary(table: datasets.Dataset, column: str, rows: Tensor, *, size: int, folder: Path) -> Words:
    """Builds the vocabulary of some rows of a table, or loads it from the cache.

    Args:
        table: table with a column of texts.
        column: name of that column.
        rows: training rows ``(N,)``.
        size: maximum number of tokens.
        folder: cache of vocabularies.
    """
    drawn = hashlib.blake2b(rows.numpy().tobytes(), digest_size=16).hexdigest()
    path = folder / f"{key_of('words', table, column, drawn, size)}.json"
    if path.is_file():
        return Words.load(path)
    words = Words.build((text or "" for text in table.select(rows.numpy())[column]), size=size)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    words.save(part)
    os.replace(part, path)  # atomic: another rank may read it at the same time
    return words
