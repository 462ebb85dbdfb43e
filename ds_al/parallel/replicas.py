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

        Replicas may use different weights (experts, layers left out at random). The message therefore has room for the
        gradient of every trained weight, zeros where this replica has none, and counts at its end which replicas have
        one. A weight that no replica has used keeps the gradient ``None``, as in one process. The host reads the counts
        only where a gradient is missing.
        """
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in parameters:
            if parameter.requires_grad:
                by_dtype.setdefault(parameter.dtype, []).append(parameter)
        for weights in by_dtype.values():
            sizes = [weight.numel() for weight in weights]
            own = [weight.grad is not None for weight in weights]
            # A list of flags would be copied to the device, which waits: where all are set, the device makes them.
            flags = weights[0].new_ones(len(own)) if all(own) else weights[0].new_tensor(own)
            flat = torch.cat([*map(_flat_gradient, weights), flags])
            dist.all_reduce(flat, group=self.group)
            *sums, used = flat.split([*sizes, len(weights)])
            anywhere = own if all(own) else used.ne(0).tolist()
            for weight, total, has_one in zip(weights, sums, anywhere, strict=True):
                if has_one:
                    mean = total.div_(self.count).view(weight.shape)
                    if weight.grad is None or weight.grad.is_sparse:
                        weight.grad = mean.clone()
                    else:
                        weight.grad.copy_(mean)

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


def _flat_gradient(weight: nn.Parameter) -> Tensor:
    """The gradient of a weight in one dimension, zeros if it has none."""
    if weight.grad is None:
        return weight.new_zeros(weight.numel())
    return (weight.grad.to_dense() if weight.grad.is_sparse else weight.grad).reshape(-1)
