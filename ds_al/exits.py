"""Early exit, and averages of exits.

A sample leaves the network at the first exit whose confidence reaches a threshold.

Confidence is the largest softmax probability of an exit's scores. The last exit takes all that are left. Source:
Teerapittayanon, McDanel & Kung, "BranchyNet", ICPR 2016, who took the entropy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_al.errors import ALConfigError
from ds_al.system import plain


@plain.record
@dataclass(frozen=True)
class EarlyExit:
    """What one threshold does to a data set.

    Attributes:
        confidence: the threshold.
        accuracy: share of the samples that the exit they left at gets right.
        left: share of the samples that left at each exit.
    """

    confidence: float
    accuracy: float
    left: list[float]


def confidence_of(scores: Tensor) -> Tensor:
    """Largest softmax probability ``(B,)`` of scores ``(B, V)``."""
    return scores.softmax(dim=1).amax(dim=1)


def leaves_at(confidence: Tensor, threshold: float) -> Tensor:
    """Index of the exit ``(S,)`` at which each sample leaves, from its confidence at every exit ``(N, S)``."""
    passes = confidence >= threshold
    passes[-1] = True
    return passes.int().argmax(dim=0)  # the first of equals


def early_exits(confidence: Tensor, correct: Tensor, thresholds: Sequence[float]) -> list[EarlyExit]:
    """The outcome of each threshold.

    Args:
        confidence: at every exit, of every sample ``(N, S)``.
        correct: whether that exit gets that sample right ``(N, S)``.
        thresholds: in (0, 1].
    """
    rows = []
    for threshold in thresholds:
        exits = leaves_at(confidence, threshold)
        right = correct.gather(0, exits.unsqueeze(0)).double().mean()
        left = torch.bincount(exits, minlength=len(confidence)).double() / len(exits)
        rows.append(EarlyExit(threshold, float(right), left.tolist()))
    return rows


def check_threshold(threshold: float) -> None:
    """Refuses what is no probability.

    Raises:
        ALConfigError: the threshold is not in (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ALConfigError(f"got an exit confidence of {threshold}: expected a probability above 0 and at most 1")


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
