"""The local losses by name.

A loss is any callable ``(prediction, target) -> scalar``. ``target`` never carries a graph.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ds_al.errors import ALConfigError

Loss = Callable[[Tensor, Tensor], Tensor]


def widened(x: Tensor) -> Tensor:
    """bfloat16 and float16 as float32, all others as they are: losses are computed with the digits of float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over all elements; both ``(B, K)``. The published default of both losses."""
    return F.mse_loss(widened(prediction), widened(target))


def cross_entropy(prediction: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of scores ``(B, V)`` against class probabilities ``(B, V)``, one-hot labels as a rule.

    Against one-hot labels this is the cross-entropy against the class index, which the published
    method uses for the autoencoder of the first layer in text models.
    """
    return F.cross_entropy(widened(prediction), widened(target))


LOSSES: dict[str, Loss] = {"mse": mse, "cross_entropy": cross_entropy}


def resolve(loss: str | Loss) -> Loss:
    """Returns the loss of that name, or the callable itself.

    Raises:
        ALConfigError: the name is not in :data:`LOSSES` and the value is not callable.
    """
    if callable(loss):
        return loss
    if loss not in LOSSES:
        raise ALConfigError(
            f"unknown loss {loss!r}: use one of {sorted(LOSSES)}, or pass a callable (prediction, target) -> scalar"
        )
    return LOSSES[loss]
