"""Data parallel copies of a pipeline: R ranks hold the same stage, and average its gradients before it steps.

    ranks of 2 stages x 2 copies        what travels
    copy 0   0 ---> 2                   --->  activations, downstream, within a copy
    copy 1   1 ---> 3                    |    gradients' mean, within a stage
             |      |

Micro-batch m of copy r is number m R + r of the whole job: so its data, and its random draws, are those of one
process that takes R micro-batches for each of this stage's. No stage waits for another stage.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor, nn


class Replicas:
    """The copies of one stage.

    Args:
        index: this rank's copy, r.
        count: number of copies, R.
        group: process group of the ranks that hold the same stage.
    """

    def __init__(self, index: int, count: int, *, group: Any) -> None:
        self.index, self.count, self.group = index, count, group

    def number(self, micro_batch: int) -> int:
        """The number in the whole job of this copy's micro-batch, both from 0."""
        return micro_batch * self.count + self.index

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces the gradients by their means over the copies: one message per dtype.

        A parameter without a gradient is left alone: all copies run the same layers, so none has one.
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
        """Overwrites a tensor by that of one copy; on every rank of the stage."""
        dist.broadcast(value, dist.get_global_rank(self.group, source), group=self.group)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over the copies; on every rank of the stage."""
        if self.count == 1:
            return value
        total = value.clone()
        dist.all_reduce(total, group=self.group)
        return total / self.count
