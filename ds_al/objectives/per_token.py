"""What the objectives of causal language models share: labels per token, and what is counted at an exit."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ds_al.objectives.base import Layer, Objective
from ds_al.tensors import to_float32

IGNORED = -100
"""The label of a token that no loss looks at, as in ``transformers``."""


class PerToken(Objective):
    """Labels ``(B, T)`` are the token ids themselves, :data:`IGNORED` where a token is not to be learned.

    The shift by one is made here, as ``transformers`` does. Scores are ``(B, T, V)``: at each token, of the next one.
    """

    per_token = True

    def first_target(self, labels: Tensor, one_hot: Tensor) -> Tensor:
        """Labels ``(B, T)``."""
        return labels

    def label_loss(self, layer: Layer, scores: Tensor, target: Tensor) -> Tensor:
        """:func:`next_token_loss`, the logarithm of the perplexity."""
        return next_token_loss(scores, target)

    def hits(self, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Next tokens that the highest score names, and tokens that have a next one to learn."""
        following = labels[:, 1:]
        return (scores[:, :-1].argmax(dim=2) == following).sum(), (following != IGNORED).sum()


def next_token_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the tokens that have a successor to learn; 0 where there is none.

    Args:
        scores: ``(B, T, V)``.
        labels: ``(B, T)``.
    """
    return mean_loss(scores[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def mean_loss(scores: Tensor, classes: Tensor) -> Tensor:
    """Mean cross-entropy of scores ``(N, M)`` against classes ``(N,)`` that are not :data:`IGNORED`; 0 without any."""
    total = F.cross_entropy(to_float32(scores), classes, ignore_index=IGNORED, reduction="sum")
    return total / torch.clamp((classes != IGNORED).sum(), min=1)
