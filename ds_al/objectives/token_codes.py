"""Objective ``token_codes``: associated learning of language models with sampled codes of next tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ds_al.errors import ALConfigError
from ds_al.objectives.base import Layer
from ds_al.objectives.candidates import candidates, places
from ds_al.objectives.per_token import PerToken, mean_loss
from ds_al.tensors import Activation, Target, to_float32


class TokenCodes(PerToken):
    """``A_i`` is the cross-entropy of ``b(s_i) . t_i`` over M candidate tokens, against the token that follows.

    ``g_1`` is an embedding, ``(M,) -> (M, K)``, and ``g_i`` maps codes to codes, so the code of token v at layer i is
    ``g_i(.. g_1(v))``. The candidates of the first layer are the distinct labels of the micro-batch, filled up with
    other tokens drawn at random to M rows in all. The target message is
    ``(labels (B, T), candidates (M,), weights (M,), codes (M, K))``: its size depends on the micro-batch, never on
    ``V K``.

    ``weights`` are added to the scores: the logarithm of how many tokens a drawn one stands for, 0 for tokens of the
    micro-batch (:mod:`ds_al.objectives.candidates`).

    ``E_1`` is the cross-entropy of ``h_1(t_1) . t_1`` over the candidates, where the target of each candidate is
    itself; ``E_i`` is the layer's ``D_E(h_i(t_i), t_{i-1})``. An exit scores all V tokens with ``b(s_i) . C_i``: the
    chain of g computes their codes ``C_i``, which are sent once per evaluation. Scores are linear in the bridge, so
    they fold into a head.

    Args:
        codes: which loss trains g: ``"associated"``, ``A_i`` without any ``E_i``, so that h is not trained;
            ``"autoencoder"``, ``E_i`` alone, as published; or ``"both"``.
        negatives: number of candidates beyond the number of tokens of a micro-batch: M is ``B T + negatives``, at most
            V.
    Raises:
        ALConfigError: an option is out of range.
    """

    target_tensors = 4
    has_code_table = True

    def __init__(self, *, codes: Literal["associated", "autoencoder", "both"] = "both", negatives: int = 0) -> None:
        super().__init__()
        if codes not in ("associated", "autoencoder", "both"):
            raise ALConfigError(
                f"objective token_codes: got codes={codes!r}: expected 'associated', 'autoencoder' or 'both'"
            )
        if not isinstance(negatives, int) or negatives < 0:
            raise ALConfigError(f"objective token_codes: got negatives={negatives!r}: expected 0 or more")
        self.codes = codes
        self.untrained = ("h",) if codes == "associated" else ()
        self.negatives = negatives

    def encode(self, layer: Layer, t: Target) -> tuple[Tensor, ...]:
        """Returns the candidates of labels ``(B, T)`` and their codes in the first layer, ``g(codes)`` in later
        ones."""
        if isinstance(t, Tensor):
            ids, weights = self.candidates(t, vocabulary=_rows(layer.g))
            return t, ids, weights, layer.g(ids)
        labels, ids, weights, codes = t
        return labels, ids, weights, layer.g(codes)

    def candidates(self, labels: Tensor, *, vocabulary: int) -> tuple[Tensor, Tensor]:
        """Returns the candidate ids in ascending order and their log weights, both ``(M,)``."""
        rows = min(vocabulary, labels.numel() + self.negatives)
        return candidates(labels[:, 1:].flatten(), rows=rows, vocabulary=vocabulary)

    def associated_loss(self, layer: Layer, s_out: Activation, t_out: Target) -> Tensor:
        """Computes the mean loss over the tokens with a labelled successor; with ``"autoencoder"`` its gradient stops
        at the codes."""
        labels, ids, weights, codes = t_out
        if self.codes == "autoencoder" and not layer.target_gradient:
            codes = codes.detach()
        scores = layer.bridge(s_out)[:, :-1].flatten(0, 1) @ codes.t() + weights
        return mean_loss(scores, places(ids, labels[:, 1:].flatten()))

    def autoencoder_loss(self, layer: Layer, t_out: Target, t_in: Target) -> Tensor | None:
        """Computes the self-classification loss of the candidates in the first layer, ``D_E(h(t_i), t_{i-1})`` in later
        ones."""
        if self.codes == "associated":
            return None
        codes = t_out[3]
        if isinstance(t_in, Tensor):
            return F.cross_entropy(
                to_float32(layer.h(codes) @ codes.t()), torch.arange(len(codes), device=codes.device)
            )
        return layer.autoencoder_loss(layer.h(codes), t_in[3])

    def all_classes(self, num_classes: int, *, device: torch.device | str) -> Tensor:
        """Returns all token ids ``(V,)``."""
        return torch.arange(num_classes, device=device)

    def scores(self, layer: Layer, s: Activation, *, earlier: Sequence[nn.Module], table: Tensor | None) -> Tensor:
        """Computes ``b(s) . C``, of shape ``(B, T, V)``."""
        assert table is not None
        return layer.bridge(s) @ table.t()


def _rows(g: nn.Module) -> int:
    """Returns V, the number of rows of the first layer's embedding."""
    if not isinstance(g, nn.Embedding):
        raise ALConfigError(
            f"objective token_codes: the first layer's g is a {type(g).__name__}: expected an nn.Embedding of V rows"
        )
    return g.num_embeddings
