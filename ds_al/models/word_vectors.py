"""Pretrained word vectors from a local text file, as initial weights of an embedding.

The file is in GloVe's format, with a word and its numbers per line, separated by spaces: ``word v_1 ... v_D``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ds_al.errors import ALConfigError


@dataclass(frozen=True)
class WordVectors:
    """A file of word vectors and the vocabulary to look up in it.

    Attributes:
        path: path of the file.
        words: word of each token id.
        width: D, numbers per word.
    """

    path: Path
    words: tuple[str, ...]
    width: int

    @torch.no_grad()
    def fill(self, weight: Tensor, *, padding_id: int) -> int:
        """Sets the rows of ``weight (vocabulary, D)`` whose words are in the file; returns their number.

        Words missing from the file keep their random weights, scaled to the standard deviation of the vectors found:
        pretrained vectors are several times smaller than random ones, which would dominate them.

        Raises:
            ALConfigError: a line of the file is not a word with D numbers.
        """
        if weight.is_meta:
            return 0
        rows = {word: row for row, word in enumerate(self.words) if row != padding_id}
        found: dict[int, list[float]] = {}
        for word, numbers in self._read():
            row = rows.get(word)
            if row is not None:
                found[row] = numbers
        if found:
            vectors = torch.tensor(list(found.values()), dtype=weight.dtype)
            if vectors.numel() > 1:
                weight *= vectors.std().to(weight.device)
            weight[torch.tensor(list(found))] = vectors.to(weight.device)
        return len(found)

    def _read(self) -> Iterator[tuple[str, list[float]]]:
        for number, line in _lines(self.path, "word_vectors"):
            word, *texts = line.rstrip().rsplit(" ", self.width)  # some words of GloVe contain spaces
            if len(texts) != self.width:
                raise ALConfigError(
                    f"word_vectors {self.path}, line {number}: got {len(texts)} numbers, expected {self.width}"
                )
            try:
                numbers = [float(text) for text in texts]
            except ValueError as error:
                raise ALConfigError(f"word_vectors {self.path}, line {number}: {error}: expected numbers") from error
            if not all(map(math.isfinite, numbers)):
                raise ALConfigError(f"word_vectors {self.path}, line {number}: expected finite numbers")
            yield word, numbers


def word_vectors(
    path: str | Path | None,
    vocabulary: Sequence[str] | str | Path | None,
    *,
    vocab_size: int,
    width: int,
) -> WordVectors | None:
    """Checks in every process that file, vocabulary and embedding match, before any layer is built.

    Args:
        path: file of vectors, or ``None`` for random weights.
        vocabulary: word of each token id, or a file with one word per line.
        vocab_size: number of tokens.
        width: D of the embedding.

    Raises:
        ALConfigError: a file is missing, or the width of the vectors or the size of the vocabulary does not match.
    """
    if path is None:
        return None
    path = Path(path)
    if vocabulary is None:
        raise ALConfigError("got word_vectors without vocabulary: give the word of each token id, or a file of them")
    if isinstance(vocabulary, (str, Path)):
        words = tuple(line.rstrip("\n") for _, line in _lines(Path(vocabulary), "vocabulary"))
    else:
        words = tuple(vocabulary)
    if len(words) != vocab_size:
        raise ALConfigError(f"got a vocabulary of {len(words)} words: expected {vocab_size}, vocab_size")
    _, first = next(_lines(path, "word_vectors"), (0, ""))
    if not first.strip():
        raise ALConfigError(
            f"word_vectors {path}: its first line is empty: expected a word and {width} numbers per line"
        )
    found = len(first.split()) - 1
    if found != width:
        raise ALConfigError(
            f"word_vectors {path}: got vectors of {found} numbers, expected {width}: "
            f"set the embedding's width to {found}"
        )
    return WordVectors(path, words, width)


def _lines(path: Path, key: str) -> Iterator[tuple[int, str]]:
    """Yields the lines of a text in UTF-8, counted from 1."""
    if not path.is_file():
        raise ALConfigError(f"got {key}={str(path)!r}: no such file")
    number = 0
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                yield number, line
    except (OSError, UnicodeDecodeError) as error:
        raise ALConfigError(f"{key} {path}, after line {number}: no text in UTF-8 ({error})") from error
