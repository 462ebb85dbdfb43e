"""Local loss functions, by name.

A loss is any callable ``(prediction, target) -> scalar``. ``target`` never carries a graph.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from ds_al.errors import ALConfigError
from ds_al.tensors import to_float32

Loss = Callable[[Tensor, Tensor], Tensor]


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Computes the mean squared error over all elements; both ``(B, K)``. The published default of both losses."""
    return F.mse_loss(to_float32(prediction), to_float32(target))


def cross_entropy(prediction: Tensor, target: Tensor) -> Tensor:
    """Computes the cross-entropy of scores ``(B, V)`` against class probabilities ``(B, V)``, usually one-hot labels.

    Against one-hot labels it equals the cross-entropy against the class index, which the published method uses for the
    autoencoder of the first layer in text models.
    """
    return F.cross_entropy(to_float32(prediction), to_float32(target))


def label_loss(scores: Tensor, labels: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Computes the cross-entropy of scores ``(B, V)`` against labels ``(B,)`` with label smoothing.

    Source of the smoothing: Szegedy et al., "Rethinking the inception architecture", CVPR 2016, section 7.
    """
    return F.cross_entropy(to_float32(scores), labels, label_smoothing=smoothing)


def check_smoothing(smoothing: float) -> None:
    """Checks the label smoothing.

    Raises:
        ALConfigError: the label smoothing is not in [0, 1).
    """
    if not 0 <= smoothing < 1:
        raise ALConfigError(f"got label_smoothing={smoothing}: expected at least 0 and less than 1, such as 0.1")


LOSSES: dict[str, Loss] = {"mse": mse, "cross_entropy": cross_entropy}


def resolve(loss: str | Loss) -> Loss:
    """Returns the loss with the given name, or the callable itself.

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
