"""``next_token``: ``greedy`` for causal language models, each layer with a private head for the next token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ds_al.losses import widened
from ds_al.objectives.base import Target
from ds_al.objectives.greedy import Greedy

if TYPE_CHECKING:
    from ds_al.layer import Activation, ALLayer

IGNORED = -100
"""The label of a token that no loss looks at, as in ``transformers``."""


class NextToken(Greedy):
    """``A_i`` is the cross-entropy of ``h_i(b(s_i))`` at every token against the token that follows it.

    b is ``(B, T, D) -> (B, T, K)``, h is ``(B, T, K) -> (B, T, V)``. Labels ``(B, T)`` are the token ids themselves,
    :data:`IGNORED` where a token is not to be learned: the shift by one is made here, as ``transformers`` does.
    g is not used, and there is no ``E_i``. t is the labels.
    """

    per_token = True

    def associated_loss(self, layer: ALLayer, s_out: Activation, t_out: Target) -> Tensor:
        """Mean over the tokens that have a successor to learn; 0 where there is none."""
        assert isinstance(t_out, Tensor)
        return _loss(layer.h(layer.bridge(s_out)), t_out)

    def scores(self, layer: ALLayer, s: Activation, *, earlier: Sequence[nn.Module], table: Tensor | None) -> Tensor:
        """``h(b(s))``: ``(B, T, V)``; at each token, scores of the next one."""
        return layer.h(layer.bridge(s))

    def label_loss(self, layer: ALLayer, scores: Tensor, target: Tensor) -> Tensor:
        """The same mean, from scores ``(B, T, V)`` and labels ``(B, T)``."""
        return _loss(scores, target)

    def hits(self, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Next tokens that the highest score names, and tokens that have a next one to learn."""
        following = labels[:, 1:]
        return (scores[:, :-1].argmax(dim=2) == following).sum(), (following != IGNORED).sum()


def _loss(scores: Tensor, labels: Tensor) -> Tensor:
    following = labels[:, 1:].flatten()
    total = F.cross_entropy(widened(scores[:, :-1]).flatten(0, 1), following, ignore_index=IGNORED, reduction="sum")
    return total / torch.clamp((following != IGNORED).sum(), min=1)
