"""A loaded data set: training, validation and test parts, and the sizes needed to build a model."""

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
    """A data set that builds whole micro-batches, which is faster than one sample at a time."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any:
        """Returns one sample ``(x, y)``."""

    def make_batch(self, indices: Tensor, augment: Callable[[Tensor], Tensor] | None = None) -> tuple[Any, Tensor]:
        """Returns the micro-batch ``(x, y)`` of samples ``(B,)``; ``augment`` is applied to x before normalisation."""


@dataclass(frozen=True, kw_only=True)
class Splits:
    """A data set in three parts.

    Images: x is float32 ``(B, C, H, W)``. Text: x is ``(ids (B, T) int64, mask (B, T) bool)``, true at a token.
    y is int64 ``(B,)``, a class number.
    """

    kind: Kind
    """Kind of x."""
    train: Part
    """Training samples."""
    validation: Part
    """Samples for choosing settings: a part of the data set, or split from its training samples."""
    test: Part
    """All published test samples, for reported results."""
    classes: list[str]
    """Class names, by number."""
    shape: tuple[int, ...]
    """Shape of one x: ``(C, H, W)`` of an image, ``(T,)`` of the longest text without truncation."""
    vocab_size: int | None = None
    """Number of tokens; text only."""
    padding_id: int | None = None
    """Id of the padding token; text only."""
    varying: bool = False
    """Whether shapes differ from one micro-batch to the next."""
    lengths: Tensor | None = None
    """Number of tokens of each training sample ``(N,)``, if micro-batches have samples of similar length."""
    save_vocabulary: Callable[[Path], None] | None = None
    """Writes the vocabulary, if it was built from the training part."""


def cut(count: int, *, fraction: float, seed: int, name: str) -> tuple[Tensor, Tensor]:
    """Draws the validation samples from the training samples.

    Args:
        count: number of training samples.
        fraction: share to hold out; may be 0.
        seed: seed of the draw.
        name: name of the data set, for the error.

    Returns:
        Ascending, disjoint indices ``(kept, held)``; together they are all samples.

    Raises:
        ALDataError: the fraction is out of range, or leaves no training sample.
    """
    held_out = round(count * fraction)
    if not 0 <= held_out < count:
        raise ALDataError(
            f"got validation_fraction={fraction}: expected 0 <= fraction < 1, so that some of the "
            f"{count} training samples of {name!r} remain to train on"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[held_out:].sort().values, order[:held_out].sort().values
