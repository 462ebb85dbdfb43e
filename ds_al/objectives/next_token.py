"""Objective ``next_token``: ``greedy`` for causal language models, with a private next-token head in each layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ds_al.errors import ALConfigError
from ds_al.objectives.base import Layer
from ds_al.objectives.candidates import candidates, places
from ds_al.objectives.per_token import PerToken, mean_loss, next_token_loss
from ds_al.tensors import Activation, Target


class NextToken(PerToken):
    """``A_i`` is the cross-entropy of ``h_i(b(s_i))`` at every token against the token that follows it.

    b is ``(B, T, D) -> (B, T, K)``, h is ``(B, T, K) -> (B, T, V)``. g is not used, and there is no ``E_i``. t is the
    labels ``(B, T)``.

    Args:
        token_share: share of the tokens, above 0 and up to 1, on which ``A_i`` is computed, drawn anew for every
            micro-batch. h, which costs most where V is large, then reads these tokens alone.
        vocabulary_share: share of the vocabulary, above 0 and up to 1, over which the softmax of ``A_i`` is computed:
            the tokens that follow in this micro-batch, and others drawn anew that stand for the rest
            (:mod:`ds_al.objectives.candidates`); at least as many as ``A_i`` has tokens. h is an ``nn.Linear``
            without hooks, of which these rows alone are used. Exits and evaluation use all of V.

        last_layer: whether the shares hold in the last layer of a converted network, too, whose h is the model's own
            head; by default it learns from all tokens, over all of V.

    Raises:
        ALConfigError: an option is out of range, or h is no plain ``nn.Linear`` where ``vocabulary_share`` is below 1.
    """

    trains_decoder = True
    untrained = ("g",)

    def __init__(self, *, token_share: float = 1.0, vocabulary_share: float = 1.0, last_layer: bool = False) -> None:
        super().__init__()
        for name, share in (("token_share", token_share), ("vocabulary_share", vocabulary_share)):
            if not isinstance(share, (int, float)) or isinstance(share, bool) or not 0 < share <= 1:
                raise ALConfigError(
                    f"objectives next_token and readout: got {name}={share!r}: expected above 0, up to 1"
                )
        if not isinstance(last_layer, bool):
            raise ALConfigError(f"objectives next_token and readout: got last_layer={last_layer!r}: expected a bool")
        self.token_share, self.vocabulary_share = float(token_share), float(vocabulary_share)
        self.last_layer = last_layer

    def encode(self, layer: Layer, t: Target) -> Target:
        """Returns the labels unchanged."""
        return t

    def associated_loss(self, layer: Layer, s_out: Activation, t_out: Target) -> Tensor:
        """Computes the mean loss over the tokens with a labelled successor; 0 if there is none."""
        assert isinstance(t_out, Tensor)
        if self.token_share == self.vocabulary_share == 1.0:
            return next_token_loss(self.read(layer, s_out, self.earlier), t_out)
        codes, classes = layer.bridge(s_out)[:, :-1].flatten(0, 1), t_out[:, 1:].flatten()
        if self.token_share < 1.0:
            count = math.ceil(self.token_share * len(classes))
            drawn = torch.randperm(len(classes), device=classes.device)[:count]
            codes, classes = codes[drawn], classes[drawn]
        h = self.decoder(layer, self.earlier)
        if self.vocabulary_share == 1.0:
            return mean_loss(h(codes), classes)
        weight, bias = _linear(h)
        rows = min(len(weight), max(math.ceil(self.vocabulary_share * len(weight)), len(classes)))
        ids, weights = candidates(classes, rows=rows, vocabulary=len(weight))
        scores = F.linear(codes, weight[ids], None if bias is None else bias[ids])
        return mean_loss(scores + weights, places(ids, classes))

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


def _linear(h: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Returns the weight ``(V, K)`` and the bias of a linear h, whose rows give the scores by themselves."""
    hooks = bool(h._forward_pre_hooks or h._forward_hooks)
    if isinstance(h, nn.Linear) and type(h).forward is nn.Linear.forward and not hooks:
        return h.weight, h.bias
    raise ALConfigError(
        f"vocabulary_share of next_token and readout: h is a {type(h).__name__}{' with hooks' * hooks}: expected an "
        "nn.Linear of V rows, without hooks; remove vocabulary_share"
    )
