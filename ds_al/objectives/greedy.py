"""Objective ``greedy``: a linear classifier on each layer and no target side. The simplest alternative to AL."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ds_al.objectives.base import Layer, Objective
from ds_al.objectives.losses import check_smoothing, label_loss
from ds_al.tensors import Activation, Target


class Greedy(Objective):
    """``A_i`` is the cross-entropy of ``h_i(b(s_i))`` against the label; h is the classifier ``(B, K) -> (B, V)``.

    g is not used (``nn.Identity`` is enough), and there is no ``E_i``. t is the labels ``(B,)``.
    Source: layer-wise training with auxiliary classifiers, Belilovsky et al., ICML 2019 and 2020.

    Args:
        label_smoothing: share of a label that ``A_i`` spreads over all classes.

    Raises:
        ALConfigError: the smoothing is out of range.
    """

    trains_decoder = True
    untrained = ("g",)

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        check_smoothing(label_smoothing)
        self.label_smoothing = label_smoothing

    def first_target(self, labels: Tensor, one_hot: Tensor) -> Tensor:
        """Returns labels ``(B,)``."""
        return labels

    def encode(self, layer: Layer, t: Target) -> Target:
        """Returns the labels unchanged."""
        return t

    def associated_loss(self, layer: Layer, s_out: Activation, t_out: Target) -> Tensor:
        """Computes the cross-entropy of the classifier's scores."""
        assert isinstance(t_out, Tensor)
        return label_loss(layer.h(layer.bridge(s_out)), t_out, smoothing=self.label_smoothing)

    def autoencoder_loss(self, layer: Layer, t_out: Target, t_in: Target) -> None:
        """Returns ``None``: there is no target side."""
        return None

    def scores(self, layer: Layer, s: Activation, *, earlier: Sequence[nn.Module], table: Tensor | None) -> Tensor:
        """Computes ``h(b(s))``."""
        return layer.h(layer.bridge(s))
