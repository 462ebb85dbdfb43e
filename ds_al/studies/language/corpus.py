"""Texts as one stream of tokens, cut into pieces of equal length. The tokenizer is a BPE of the training texts."""

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
"""Stands after every text."""


@dataclass(frozen=True)
class Corpus:
    """Pieces of ``T`` tokens, int64.

    Attributes:
        train, validation, test: ``(pieces, T)``; no text of one part is in another.
        vocabulary: V.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    vocabulary: int


def load_corpus(
    name: str, *, path: str | None, vocabulary: int, length: int, validation_fraction: float, cache_folder: str | None
) -> Corpus:
    """Reads a data set's texts; tokenizer and tokens are kept and found again.

    Args:
        name, path: see :func:`ds_al.data.tables.find`; a folder with ``train.parquet`` and ``test.parquet`` will do.
        vocabulary: V, at most.
        length: T.
        validation_fraction: share of the training texts that is cut off for validation, by a seed of its own.
        cache_folder: see :func:`ds_al.data.cache.folder`.

    Raises:
        ALDataError: it has no texts, or too few for one piece.
    """
    source = find(name, path=path, image_column=None, text_column=None, label_column=None, cache=None)
    if source.kind != "text":
        raise ALDataError(f"got {name}, a data set of {source.kind}s: expected one of texts")
    kept, held = cut(len(source.parts["train"]), fraction=validation_fraction, seed=0, name=name)
    train = source.parts["train"]
    texts = {
        "train": train.select(kept.tolist())[source.x],
        "validation": train.select(held.tolist())[source.x],
        "test": source.parts["test"][source.x],
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
    """A byte-level BPE of these texts, as that of GPT-2; read from the file where it is there."""
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
    """All texts, each with :data:`END` after it, as uint16 ``(tokens,)``."""
    if file.is_file():
        return np.load(file)
    end = tokenizer.token_to_id(END)
    stream = [number for coded in tokenizer.encode_batch(texts) for number in (*coded.ids, end)]
    made = np.array(stream, dtype=np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.int64)
    np.save(file, made)
    return made
