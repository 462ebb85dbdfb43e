"""Sizes of the micro-batches and batches of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ds_al.errors import ALConfigError
from ds_al.experiment.forms import Form


@dataclass(frozen=True, kw_only=True)
class BatchSizes:
    """How many samples and micro-batches a batch has.

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
            ALConfigError: a size is missing or below 1, or the replicas cannot share the micro-batches of a batch.
        """
        micro_batch = _positive(config, "train_micro_batch_size_per_gpu")
        micro_batches = _positive(config, "gradient_accumulation_steps")
        return cls(
            micro_batch=micro_batch,
            micro_batches=micro_batches,
            per_replica=form.micro_batches(micro_batches, replicas=replicas),
            replicas=replicas,
        )

    @property
    def samples(self) -> int:
        """Samples per batch, over all replicas."""
        return self.micro_batch * self.per_replica * self.replicas

    def batches_per_epoch(self, samples: int) -> int:
        """Returns the number of batches in one pass over so many samples.

        Raises:
            ALConfigError: the samples make no batch.
        """
        if samples < self.samples:
            raise ALConfigError(
                f"{samples} training samples make no batch of {self.samples}, {self.per_replica} micro-batches of "
                f"{self.micro_batch} in each of {self.replicas} replicas: "
                "lower train_micro_batch_size_per_gpu or gradient_accumulation_steps"
            )
        return samples // self.samples


def _positive(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ALConfigError(f'"{key}": got {value!r}, expected a whole number of 1 or more')
    return value
