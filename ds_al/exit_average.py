"""The mean of several exits: every layer's bridge has learned to name the class, so their opinions can be averaged.

What is averaged are softmax probabilities ``(B, V)``. The last exit by itself is what back-propagation has; those
before it cost a forward pass of their bridges more, and no training at all.
"""

from __future__ import annotations

from torch import Tensor

from ds_al.errors import ALConfigError


def averaged_accuracy(probabilities: Tensor, labels: Tensor) -> list[float]:
    """Accuracy of the mean of the last n exits, for n = 1 .. N.

    Args:
        probabilities: of every exit, the first one first ``(N, S, V)``.
        labels: ``(S,)``.
    """
    means = probabilities.flip(0).cumsum(dim=0)  # sums name the same class as means
    return [float((mean.argmax(dim=1) == labels).double().mean()) for mean in means]


def check_average(average: int, *, exit: int) -> None:
    """Refuses to average exits that are not there.

    Raises:
        ALConfigError: ``average`` is not in 1..exit.
    """
    if not 1 <= average <= exit:
        raise ALConfigError(f"got average={average}: expected 1..{exit}, the number of exits up to the one asked for")
