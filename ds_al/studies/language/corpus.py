"""Tokenizes texts with a BPE trained on the training texts, and cuts the token stream into equal pieces."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from ds_al.data import cache
from ds_al.data.splits import cut
from ds_al.data.tables import find
from ds_al.errors import ALDataError

END = "<|endoftext|>"
"""Token that ends every text."""


@dataclass(frozen=True)
class Corpus:
    """Sequences of ``T`` tokens, int64.

    Attributes:
        train, validation, test: ``(sequences, T)``; the parts share no text.
        vocabulary: number of tokens, V.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    vocabulary: int


def load_corpus(
    name: str, *, path: str | None, vocabulary: int, length: int, validation_fraction: float, cache_folder: str | None
) -> Corpus:
    """Reads and tokenizes the texts of a data set; tokenizer and tokens are cached.

    Args:
        name, path: see :func:`ds_al.data.tables.find`; a folder with ``train.parquet`` and ``test.parquet`` suffices.
        vocabulary: maximum vocabulary size, V.
        length: tokens per sequence, T.
        validation_fraction: share of the training texts used for validation, split by a separate seed.
        cache_folder: see :func:`ds_al.data.cache.folder`.

    Raises:
        ALDataError: the data set has no texts, or too few for one sequence.
    """
    source = find(name, path=path, image_column=None, text_column=None, label_column=None, cache=None)
    if source.kind != "text":
        raise ALDataError(f"got {name}, a data set of {source.kind}s: expected one of texts")
    kept, held = cut(len(source.parts["train"].table), fraction=validation_fraction, seed=0, name=name)
    train = source.parts["train"].table
    texts = {
        "train": train.select(kept.tolist())[source.x],
        "validation": train.select(held.tolist())[source.x],
        "test": source.parts["test"].table[source.x],
    }
    folder = cache.folder(cache_folder)
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.blake2b(digest_size=12)
    for part, each in texts.items():
        digest.update(f"{part} {vocabulary} {len(each)}".encode())
        for text in each:
            digest.update(text.encode())
    file = folder / f"bpe-{digest.hexdigest()}"
    tokenizer = bpe(texts["train"], size=vocabulary, file=file.with_suffix(".json"))
    pieces = {}
    for part, each in texts.items():
        stream = tokens(each, tokenizer, file=file.with_name(f"{file.name}-{part}.npy"))
        count = len(stream) // length
        if not count:
            raise ALDataError(f"the {part} part of {name} has {len(stream)} tokens: expected {length} or more")
        pieces[part] = torch.from_numpy(stream[: count * length].astype(np.int64)).view(count, length)
    return Corpus(pieces["train"], pieces["validation"], pieces["test"], tokenizer.get_vocab_size())


def bpe(texts: list[str], *, size: int, file: Path) -> Tokenizer:
    """Returns a byte-level BPE like that of GPT-2, read from the file if it exists, else trained on these texts."""
    if file.is_file():
        return Tokenizer.from_file(str(file))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(file))
    return tokenizer


def tokens(texts: list[str], tokenizer: Tokenizer, *, file: Path) -> np.ndarray:
    """Returns the tokens of all texts, each followed by :data:`END`, as uint16 ``(tokens,)``."""
    if file.is_file():
        return np.load(file)
    end = tokenizer.token_to_id(END)
    stream = [number for coded in tokenizer.encode_batch(texts) for number in (*coded.ids, end)]
    made = np.array(stream, dtype=np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.int64)
    np.save(file, made)
    return made
