"""Base class of the objectives of causal language models: labels per token, next-token loss and accuracy."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ds_al.objectives.base import Layer, Objective
from ds_al.tensors import to_float32

IGNORED = -100
"""Label of a token that no loss evaluates, as in ``transformers``."""


class PerToken(Objective):
    """Labels ``(B, T)`` are the token ids themselves; :data:`IGNORED` marks tokens without a loss.

    The labels are shifted by one here, as in ``transformers``. Scores are ``(B, T, V)``: at each token, those of the
    next.
    """

    per_token = True

    def first_target(self, labels: Tensor, one_hot: Tensor) -> Tensor:
        """Returns labels ``(B, T)``."""
        return labels

    def label_loss(self, layer: Layer, scores: Tensor, target: Tensor) -> Tensor:
        """Computes :func:`next_token_loss`, the logarithm of the perplexity."""
        return next_token_loss(scores, target)

    def hits(self, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the number of next tokens that the highest score predicts, and the number of labelled next tokens."""
        following = labels[:, 1:]
        return (scores[:, :-1].argmax(dim=2) == following).sum(), (following != IGNORED).sum()


def next_token_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Computes the mean cross-entropy over the tokens with a labelled successor; 0 if there is none.

    Args:
        scores: ``(B, T, V)``.
        labels: ``(B, T)``.
    """
    return mean_loss(scores[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def mean_loss(scores: Tensor, classes: Tensor) -> Tensor:
    """Computes the mean cross-entropy of scores ``(N, M)`` over classes ``(N,)`` other than :data:`IGNORED`; 0 if
    none."""
    total = F.cross_entropy(to_float32(scores), classes, ignore_index=IGNORED, reduction="sum")
    return total / torch.clamp((classes != IGNORED).sum(), min=1)
