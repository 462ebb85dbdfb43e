"""How long a run trains: a number of epochs, which a number of batches or of seconds may cut short."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """The stopping rule of a run, the same for every method.

    Attributes:
        batches_per_epoch: of the training samples.
        max_epochs: passes over them.
        max_batches: ends training in the middle of an epoch; ``None``: never. The LR schedule ends there, too.
        max_seconds: of training, without evaluations: the epoch in which it is reached is the last one; ``None``:
            never. The LR schedule does not know of it.
    """

    batches_per_epoch: int
    max_epochs: int
    max_batches: int | None = None
    max_seconds: float | None = None

    @property
    def total_batches(self) -> int:
        """Of the whole run, unless its time is over before."""
        batches = self.max_epochs * self.batches_per_epoch
        return batches if self.max_batches is None else min(batches, self.max_batches)

    @property
    def epochs(self) -> int:
        """Of the whole run; the last may be cut short."""
        return -(-self.total_batches // self.batches_per_epoch)

    def batches(self, epoch: int) -> int:
        """Of an epoch, counted from 0."""
        return min(self.batches_per_epoch, self.total_batches - epoch * self.batches_per_epoch)

    def ends(self, epoch: int, *, seconds: float) -> bool:
        """Whether this epoch, after so many seconds of training, is the last one."""
        return epoch + 1 >= self.epochs or (self.max_seconds is not None and seconds >= self.max_seconds)
