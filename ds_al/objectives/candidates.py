"""Candidate tokens of a micro-batch: its own next tokens, and others drawn at random that stand for the rest.

A drawn token represents ``(V - U) / (M - U)`` others, where U is the number of distinct next tokens and M that of
candidates. The logarithm of this factor, 0 for next tokens, is added to the scores: the sum under the softmax is thus
an unbiased estimate of the sum over all V tokens, and exact if M = V (importance sampling as in Bengio and Senécal,
IEEE Transactions on Neural Networks 19(4), 2008, with a uniform proposal).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_al.objectives.per_token import IGNORED


@torch.no_grad()
def candidates(following: Tensor, *, rows: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Returns the candidate ids in ascending order and their log weights, both ``(M,)``.

    Args:
        following: the next tokens ``(N,)``; :data:`IGNORED` marks those without a loss.
        rows: M, at most V and at least the number of distinct next tokens.
        vocabulary: V.
    """
    present = torch.zeros(vocabulary + 1, dtype=torch.bool, device=following.device)
    present[torch.where(following == IGNORED, vocabulary, following)] = True
    present = present[:vocabulary]
    # The order is random, with the tokens of the micro-batch first.
    order = torch.rand(vocabulary, device=following.device).masked_fill_(present, 2.0)
    ids = order.topk(rows, sorted=False).indices.sort().values
    own = present.sum()
    others = torch.log((vocabulary - own) / (rows - own).clamp(min=1))
    return ids, torch.where(present[ids], 0.0, others)


def places(ids: Tensor, following: Tensor) -> Tensor:
    """Returns the place of each next token ``(N,)`` among the candidates; :data:`IGNORED` stays."""
    return torch.where(following == IGNORED, IGNORED, torch.searchsorted(ids, following))
