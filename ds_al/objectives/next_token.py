"""Objective ``next_token``: ``greedy`` for causal language models, with a private next-token head in each layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ds_al.objectives.base import Layer
from ds_al.objectives.per_token import PerToken, next_token_loss
from ds_al.tensors import Activation, Target


class NextToken(PerToken):
    """``A_i`` is the cross-entropy of ``h_i(b(s_i))`` at every token against the token that follows it.

    b is ``(B, T, D) -> (B, T, K)``, h is ``(B, T, K) -> (B, T, V)``. g is not used, and there is no ``E_i``. t is the
    labels ``(B, T)``.
    """

    trains_decoder = True
    untrained = ("g",)

    def encode(self, layer: Layer, t: Target) -> Target:
        """Returns the labels unchanged."""
        return t

    def associated_loss(self, layer: Layer, s_out: Activation, t_out: Target) -> Tensor:
        """Computes the mean loss over the tokens with a labelled successor; 0 if there is none."""
        assert isinstance(t_out, Tensor)
        return next_token_loss(self.read(layer, s_out, self.earlier), t_out)

    def autoencoder_loss(self, layer: Layer, t_out: Target, t_in: Target) -> None:
        """Returns ``None``: there is no target side."""
        return None

    def scores(self, layer: Layer, s: Activation, *, earlier: Sequence[nn.Module], table: Tensor | None) -> Tensor:
        """Returns ``(B, T, V)``: at each token, the scores of the next one."""
        return self.read(layer, s, earlier)

    def read(self, layer: Layer, s: Activation, earlier: Sequence[nn.Module]) -> Tensor:
        """Computes ``h(b(s))``."""
        return layer.h(layer.bridge(s))
