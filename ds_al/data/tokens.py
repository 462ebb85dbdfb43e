"""In-memory text data set, tokenized and padded per micro-batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Tokens:
    """Data set of labelled texts, whose token ids are concatenated in one tensor.

    Args:
        flat: tokens of all texts ``(sum of lengths,)``, an integer type.
        lengths: number of tokens of each text ``(N,)``, ``int64``.
        labels: ``(N,)``, ``int64``.
        padding_id: id of the padding token.
        pad_to: T of every micro-batch, an upper bound of the lengths; by default the length of its longest text.
    """

    def __init__(
        self, flat: Tensor, lengths: Tensor, labels: Tensor, *, padding_id: int, pad_to: int | None = None
    ) -> None:
        self.flat, self.lengths, self.labels = flat, lengths, labels
        self.padding_id, self.pad_to = padding_id, pad_to
        self._starts = lengths.cumsum(0) - lengths

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Returns one sample: its tokens ``(length,)``, without padding, and its label."""
        start = int(self._starts[index])
        return self.flat[start : start + int(self.lengths[index])].long(), self.labels[index]

    def make_batch(
        self, indices: Tensor, augment: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Returns ``((ids (B, T) int64, mask (B, T) bool), y (B,))``, padded at the end; the mask is true at a token.

        T is at least 1, even for a micro-batch of empty texts. ``augment`` is applied to the ids.
        """
        lengths = self.lengths[indices]
        width = self.pad_to or max(int(lengths.max()), 1)
        steps = torch.arange(width)
        mask = steps < lengths[:, None]
        ids = torch.full(mask.shape, self.padding_id, dtype=torch.int64)
        ids[mask] = self.flat[(self._starts[indices][:, None] + steps)[mask]].long()
        return ((ids if augment is None else augment(ids)), mask), self.labels[indices]

    def select(self, rows: Tensor) -> Tokens:
        """Returns the data set of these samples, in this order."""
        lengths, starts = self.lengths[rows], self._starts[rows]
        first = torch.repeat_interleave(starts - (lengths.cumsum(0) - lengths), lengths)
        flat = self.flat[first + torch.arange(len(first))]
        return Tokens(flat, lengths, self.labels[rows], padding_id=self.padding_id, pad_to=self.pad_to)
