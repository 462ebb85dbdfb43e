"""Objective ``next_token``: ``greedy`` for causal language models, with a private next-token head in each layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ds_al.errors import ALConfigError
from ds_al.objectives.base import Layer
from ds_al.objectives.per_token import PerToken, mean_loss, next_token_loss
from ds_al.tensors import Activation, Target


class NextToken(PerToken):
    """``A_i`` is the cross-entropy of ``h_i(b(s_i))`` at every token against the token that follows it.

    b is ``(B, T, D) -> (B, T, K)``, h is ``(B, T, K) -> (B, T, V)``. g is not used, and there is no ``E_i``. t is the
    labels ``(B, T)``.

    Args:
        token_share: share of the tokens, above 0 and up to 1, on which ``A_i`` is computed, drawn anew for every
            micro-batch. h, which costs most where V is large, then reads these tokens alone. In a converted network the
            last layer, whose h is the model's own head, learns from all tokens.
    Raises:
        ALConfigError: ``token_share`` is out of range.
    """

    trains_decoder = True
    untrained = ("g",)

    def __init__(self, *, token_share: float = 1.0) -> None:
        super().__init__()
        if not isinstance(token_share, (int, float)) or isinstance(token_share, bool) or not 0 < token_share <= 1:
            raise ALConfigError(
                f"objectives next_token and readout: got token_share={token_share!r}: expected above 0, up to 1"
            )
        self.token_share = float(token_share)

    def encode(self, layer: Layer, t: Target) -> Target:
        """Returns the labels unchanged."""
        return t

    def associated_loss(self, layer: Layer, s_out: Activation, t_out: Target) -> Tensor:
        """Computes the mean loss over the tokens with a labelled successor; 0 if there is none."""
        assert isinstance(t_out, Tensor)
        if self.token_share == 1.0:
            return next_token_loss(self.read(layer, s_out, self.earlier), t_out)
        codes, classes = layer.bridge(s_out)[:, :-1].flatten(0, 1), t_out[:, 1:].flatten()
        count = math.ceil(self.token_share * len(classes))
        drawn = torch.randperm(len(classes), device=classes.device)[:count]
        return mean_loss(self.decoder(layer, self.earlier)(codes[drawn]), classes[drawn])

    def autoencoder_loss(self, layer: Layer, t_out: Target, t_in: Target) -> None:
        """Returns ``None``: there is no target side."""
        return None

    def scores(self, layer: Layer, s: Activation, *, earlier: Sequence[nn.Module], table: Tensor | None) -> Tensor:
        """Returns ``(B, T, V)``: at each token, the scores of the next one."""
        return self.read(layer, s, earlier)

    def read(self, layer: Layer, s: Activation, earlier: Sequence[nn.Module]) -> Tensor:
        """Computes ``h(b(s))``."""
        return self.decoder(layer, earlier)(layer.bridge(s))

    def decoder(self, layer: Layer, earlier: Sequence[nn.Module]) -> nn.Module:
        """Returns h."""
        return layer.h
