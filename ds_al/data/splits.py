"""What a data set is once it is loaded: three parts that make micro-batches, and what a model must know of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ds_al.errors import ALDataError

Kind = Literal["image", "text"]


class Part(Protocol):
    """A data set that makes whole micro-batches, which is quicker than one sample at a time."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any:
        """One sample ``(x, y)``."""

    def make_batch(self, indices: Tensor, augment: Callable[[Tensor], Tensor] | None = None) -> tuple[Any, Tensor]:
        """The micro-batch ``(x, y)`` of these samples ``(B,)``; ``augment`` changes x before it is normalised."""


@dataclass(frozen=True, kw_only=True)
class Splits:
    """A data set, cut in three.

    Images: x is float32 ``(B, C, H, W)``. Text: x is ``(ids (B, T) int64, mask (B, T) bool)``, true at a token.
    y is int64 ``(B,)``, a class number.
    """

    kind: Kind
    """What x is."""
    train: Part
    """What a model trains on."""
    validation: Part
    """What settings are chosen by: the set's own, or cut from its training samples."""
    test: Part
    """The published test samples, all of them: what is reported."""
    classes: list[str]
    """Names of the classes, by number."""
    shape: tuple[int, ...]
    """Of one x: ``(C, H, W)`` of an image, ``(T,)`` of the longest text that is not cut."""
    vocab_size: int | None = None
    """Number of tokens; text alone."""
    padding_id: int | None = None
    """The token that fills shorter texts; text alone."""
    varying: bool = False
    """Shapes differ from one micro-batch to the next."""
    lengths: Tensor | None = None
    """Tokens of each training sample ``(N,)``, where micro-batches are to be made of samples alike in length."""
    save_vocabulary: Callable[[Path], None] | None = None
    """Writes the vocabulary that was built from the training part, where one was."""


def cut(count: int, *, fraction: float, seed: int, name: str) -> tuple[Tensor, Tensor]:
    """Draws which training samples become the validation part.

    Args:
        count: number of training samples.
        fraction: share to hold out, 0 included.
        seed: decides which ones.
        name: of the data set, for the error.

    Returns:
        Ascending indices ``(kept, held)``, disjoint; together all.

    Raises:
        ALDataError: the fraction is out of range, or leaves nothing to train on.
    """
    held_out = round(count * fraction)
    if not 0 <= held_out < count:
        raise ALDataError(
            f"got validation_fraction={fraction}: expected 0 <= fraction < 1, so that some of the "
            f"{count} training samples of {name!r} remain to train on"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[held_out:].sort().values, order[:held_out].sort().values
