"""Data parallel training of the twin, ``bp_dp``: the baseline if the whole network fits on one rank.

Every rank is a replica: DeepSpeed's engine with a ``PipelineModule`` of one stage. Each of P replicas trains M / P of a
batch's M micro-batches, then DeepSpeed averages the gradients over all replicas, and each performs the same step.
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
    """Builds a ``PipelineModule`` with all layers of a twin in one stage, so that every rank is a replica.

    Args:
        twin: layers from :func:`~ds_al.models.build_twin`.
        options: options of the ``PipelineModule``, such as ``loss_fn``; ``num_stages`` is 1.
    """
    return PipelineModule(list(twin), num_stages=1, **options)


def check_module(module: PipelineModule, method: str) -> None:
    """Checks that a module has one stage, for a method that trains the whole network on every rank.

    Raises:
        ALConfigError: the module has several stages.
    """
    if module.num_stages != 1:
        raise ALConfigError(
            f"{method} got a PipelineModule of {module.num_stages} stages: expected 1, since every rank is a replica "
            "of the whole network. Build it with ds_al.baseline.data_parallel.replica_module, or use "
            "another bp_* method"
        )


def micro_batches_per_replica(micro_batches: int, replicas: int) -> int:
    """Returns the micro-batches of a batch that each replica trains: M / P, rounded up, equal on all replicas."""
    return -(-micro_batches // replicas)


def share(micro_batches: Iterable[MicroBatch], *, replica: int, replicas: int) -> Iterator[MicroBatch]:
    """Returns every ``replicas``-th micro-batch, starting at ``replica``; together, the replicas read each one once.

    A batch of M micro-batches thus holds the same samples as in a pipeline, if the number of replicas divides M.
    """
    return islice(iter(micro_batches), replica, None, replicas)
