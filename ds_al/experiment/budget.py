"""Sizes of a run: samples of a batch, batches of an epoch, epochs until it ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ds_al.config.sizes import MICRO_BATCH, MICRO_BATCHES, batch_sizes
from ds_al.errors import ALConfigError
from ds_al.experiment.forms import Form


@dataclass(frozen=True, kw_only=True)
class BatchSizes:
    """Samples and micro-batches of a batch.

    Attributes:
        micro_batch: samples per micro-batch.
        micro_batches: the config's ``gradient_accumulation_steps``.
        per_replica: micro-batches that each replica trains per batch.
        replicas: number of replicas.
    """

    micro_batch: int
    micro_batches: int
    per_replica: int
    replicas: int

    @classmethod
    def of(cls, config: Mapping[str, Any], form: Form, *, replicas: int) -> BatchSizes:
        """Reads the sizes that a config asks for.

        Raises:
            ALConfigError: sizes are missing, wrong or disagree, or the replicas cannot share the micro-batches.
        """
        share = form.micro_batches(replicas, replicas=replicas)  # of a batch of R micro-batches: 1 where replicas share
        sizes = batch_sizes(config, replicas=share)
        per_replica = form.micro_batches(sizes[MICRO_BATCHES], replicas=replicas)
        return cls(
            micro_batch=sizes[MICRO_BATCH],
            micro_batches=sizes[MICRO_BATCHES],
            per_replica=per_replica,
            replicas=replicas,
        )

    @property
    def samples(self) -> int:
        """Samples per batch, over all replicas."""
        return self.micro_batch * self.per_replica * self.replicas

    def batches_per_epoch(self, samples: int) -> int:
        """Returns the number of batches in one pass over so many samples; raises ``ALConfigError`` if it is 0."""
        if samples < self.samples:
            raise ALConfigError(
                f"{samples} training samples make no batch of {self.samples}, {self.per_replica} micro-batches of "
                f"{self.micro_batch} in each of {self.replicas} replicas: "
                "lower train_micro_batch_size_per_gpu or gradient_accumulation_steps"
            )
        return samples // self.samples


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

    def position(self, batches: int) -> tuple[int, int]:
        """Returns the epoch, counted from 0, that follows after so many batches, and how many of them are its own."""
        epoch, own = divmod(batches, self.batches_per_epoch)
        return (epoch + 1, 0) if batches == self.total_batches and own else (epoch, own)

    def ends(self, epoch: int, *, seconds: float) -> bool:
        """Whether this epoch is the last one, after so many seconds of training."""
        return epoch + 1 >= self.epochs or (self.max_seconds is not None and seconds >= self.max_seconds)
