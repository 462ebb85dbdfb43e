"""Word tokenizer with a vocabulary built from the training texts."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

_WORD = re.compile(r"\w+|[^\w\s]")

PADDING, UNKNOWN = "<pad>", "<unk>"


class Words:
    """Converts lower-case words and punctuation marks to token ids; 0 is padding, 1 any unknown word.

    Args:
        vocabulary: all tokens by id; the two special ones are first.
    """

    padding_id = 0

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.vocabulary = list(vocabulary)
        self._numbers = {word: number for number, word in enumerate(self.vocabulary)}

    @classmethod
    def build(cls, texts: Iterable[str], *, size: int) -> Words:
        """Builds the vocabulary of the most frequent words; ties are broken alphabetically.

        Args:
            texts: texts of the training part.
            size: maximum number of tokens, including the two special ones.
        """
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(split(text))
        ordered = sorted(counts, key=lambda word: (-counts[word], word))
        return cls([PADDING, UNKNOWN, *ordered[: size - 2]])

    def save(self, path: Path) -> None:
        """Writes all tokens as a JSON list."""
        path.write_text(json.dumps(self.vocabulary, ensure_ascii=False) + "\n", encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return len(self.vocabulary)

    @property
    def fingerprint(self) -> str:
        """Hash of the vocabulary."""
        return hashlib.blake2b("\n".join(self.vocabulary).encode(), digest_size=8).hexdigest()

    def encode(self, texts: list[str], *, max_length: int) -> list[list[int]]:
        """Returns the ids of the first ``max_length`` tokens of each text."""
        return [[self._numbers.get(word, 1) for word in split(text)[:max_length]] for text in texts]


def split(text: str) -> list[str]:
    """Splits ``"It's so-so."`` into ``["it", "'", "s", "so", "-", "so", "."]``."""
    return _WORD.findall(text.lower())
