"""Data parallel training of the twin, ``bp_dp``: what a pipeline has to beat where the whole network fits on a rank.

Every rank is a replica: DeepSpeed's engine over a ``PipelineModule`` of one stage. Of a batch's M micro-batches each of
P replicas trains M / P, then DeepSpeed averages the gradients over all, and every replica takes the same step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

from deepspeed.pipe import LayerSpec, PipelineModule

from ds_al.errors import ALConfigError

METHOD = "bp_dp"

MicroBatch = TypeVar("MicroBatch")


def replica_module(twin: Sequence[LayerSpec], **options: Any) -> PipelineModule:
    """All layers of a twin in one stage, so that DeepSpeed makes every rank a replica.

    Args:
        twin: what :func:`~ds_al.models.build_twin` gives.
        options: of the ``PipelineModule``, such as ``loss_fn``; ``num_stages`` is 1.
    """
    return PipelineModule(list(twin), num_stages=1, **options)


def check_module(module: PipelineModule) -> None:
    """Raises:
    ALConfigError: the module is cut into stages.
    """
    if module.num_stages != 1:
        raise ALConfigError(
            f"{METHOD} got a PipelineModule of {module.num_stages} stages: expected 1, since every rank is a replica "
            "of the whole network. Build it with ds_al.baseline.data_parallel.replica_module, or use "
            "another bp_* method"
        )


def micro_batches_per_replica(micro_batches: int, replicas: int) -> int:
    """What a replica trains of a batch: M / P, rounded up, since all train equally many."""
    return -(-micro_batches // replicas)


def share(micro_batches: Iterable[MicroBatch], *, replica: int, replicas: int) -> Iterator[MicroBatch]:
    """Every ``replicas``-th micro-batch, from the ``replica``-th on: together, all replicas read each of them once.

    So a batch of M micro-batches holds the same samples as in a pipeline, if the replicas divide M.
    """
    return islice(iter(micro_batches), replica, None, replicas)
