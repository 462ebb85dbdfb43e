"""Data parallel replicas of a pipeline: R ranks hold the same stage, and average its gradients before it steps.

    ranks of 2 stages x 2 replicas      communication
    replica 0   0 ---> 2                --->  activations, downstream, within a replica
    replica 1   1 ---> 3                 |    averaged gradients, within a stage
                |      |

Micro-batch m of replica r has number m R + r in the whole job, so its data and random draws equal those of one process
that accumulates R micro-batches for each of this stage's. No stage waits for another stage.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor, nn


class Replicas:
    """Data parallel replicas of one stage.

    Args:
        index: index of this rank's replica, r.
        count: number of replicas, R.
        group: process group of the ranks that hold the same stage.
    """

    def __init__(self, index: int, count: int, *, group: Any) -> None:
        self.index, self.count, self.group = index, count, group

    def number(self, micro_batch: int) -> int:
        """Returns the number in the whole job of a micro-batch of this replica, both from 0."""
        return micro_batch * self.count + self.index

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Averages the gradients over the replicas in place, with one all-reduce per dtype.

        A parameter without a gradient is skipped: all replicas run the same layers, so it has none on any of them.
        """
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is not None:
                by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for gradients in by_dtype.values():
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            dist.all_reduce(flat, group=self.group)
            parts = flat.div_(self.count).split([gradient.numel() for gradient in gradients])
            for gradient, mean in zip(gradients, parts, strict=True):
                gradient.copy_(mean.view_as(gradient))

    def broadcast(self, value: Tensor, *, source: int) -> None:
        """Broadcasts a tensor in place from one replica. Every rank of the stage must call it."""
        dist.broadcast(value, dist.get_global_rank(self.group, source), group=self.group)

    def mean(self, value: Tensor) -> Tensor:
        """Returns the mean of a tensor over the replicas. Every rank of the stage must call it."""
        if self.count == 1:
            return value
        total = value.clone()
        dist.all_reduce(total, group=self.group)
        return total / self.count
