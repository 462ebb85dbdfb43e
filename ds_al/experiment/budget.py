"""Length of a run: a number of epochs, which limits of batches or of seconds may cut short."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """The stopping rule of a run, the same for every method.

    Attributes:
        batches_per_epoch: batches of one pass over the training samples.
        max_epochs: passes over the training samples.
        max_batches: limit of batches, which may end training within an epoch; ``None`` for no limit. The LR schedule
            ends there, too.
        max_seconds: limit of training time without evaluations; the epoch that reaches it is the last one. ``None``
            for no limit. The LR schedule does not use it.
    """

    batches_per_epoch: int
    max_epochs: int
    max_batches: int | None = None
    max_seconds: float | None = None

    @property
    def total_batches(self) -> int:
        """Batches of the whole run, unless the limit of seconds ends it earlier."""
        batches = self.max_epochs * self.batches_per_epoch
        return batches if self.max_batches is None else min(batches, self.max_batches)

    @property
    def epochs(self) -> int:
        """Epochs of the whole run; the last one may be cut short."""
        return -(-self.total_batches // self.batches_per_epoch)

    def batches(self, epoch: int) -> int:
        """Returns the number of batches of an epoch, counted from 0."""
        return min(self.batches_per_epoch, self.total_batches - epoch * self.batches_per_epoch)

    def ends(self, epoch: int, *, seconds: float) -> bool:
        """Whether this epoch is the last one, after so many seconds of training."""
        return epoch + 1 >= self.epochs or (self.max_seconds is not None and seconds >= self.max_seconds)
