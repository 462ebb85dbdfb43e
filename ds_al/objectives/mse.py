"""Objective ``mse``, the published one: regression of the bridge's output onto the code of the sample's label."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ds_al.objectives.base import Layer, Objective
from ds_al.tensors import Activation, Target


class Mse(Objective):
    """``A_i = D_A(b(s_i), sg t_i)``, ``E_i = D_E(h(t_i), sg t_{i-1})``; t is a code ``(B, K)`` per sample.

    ``D_A`` and ``D_E`` are the layer's ``associated_loss`` and ``autoencoder_loss``, mean squared errors by
    default. Source: Kao & Chen, Neural Computation 33(1), 2021; Wu et al., ICLR 2022.
    """

    def first_target(self, labels: Tensor, one_hot: Tensor) -> Tensor:
        """Returns one-hot labels ``(B, V)``."""
        return one_hot

    def encode(self, layer: Layer, t: Target) -> Target:
        """Computes ``g(t)``."""
        return layer.g(t)

    def associated_loss(self, layer: Layer, s_out: Activation, t_out: Target) -> Tensor:
        """Computes ``D_A(b(s_i), t_i)``; no gradient reaches ``t_i`` unless the layer has ``target_gradient``."""
        assert isinstance(t_out, Tensor)
        return layer.associated_loss(layer.bridge(s_out), t_out if layer.target_gradient else t_out.detach())

    def autoencoder_loss(self, layer: Layer, t_out: Target, t_in: Target) -> Tensor:
        """Computes ``D_E(h(t_i), t_{i-1})``."""
        assert isinstance(t_in, Tensor)
        return layer.autoencoder_loss(layer.h(t_out), t_in)

    def scores(self, layer: Layer, s: Activation, *, earlier: Sequence[nn.Module], table: Tensor | None) -> Tensor:
        """Computes ``h_1(.. h_i(b(s)))``."""
        return decode([*earlier, layer.h], layer.bridge(s))

    def label_loss(self, layer: Layer, scores: Tensor, target: Tensor) -> Tensor:
        """Computes ``D_E`` of the first layer."""
        return layer.autoencoder_loss(scores, target)


def decode(decoders: Sequence[nn.Module], code: Tensor) -> Tensor:
    """Decodes a code of layer m to label scores, applying ``h_m`` first and ``h_1`` last.

    Args:
        decoders: ``[h_1, ..., h_m]``, in the order of the layers.
        code: ``(B, K_m)``.

    Returns:
        Label scores ``(B, V)``.
    """
    for h in reversed(decoders):
        code = h(code)
    return code
