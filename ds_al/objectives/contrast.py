"""Objective ``contrast``: softmax over the similarities of the bridge's output to the codes of all classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ds_al.errors import ALConfigError
from ds_al.objectives.base import Layer, Objective
from ds_al.objectives.losses import check_smoothing, label_loss
from ds_al.objectives.mse import decode
from ds_al.tensors import Activation, Target, to_float32


class Contrast(Objective):
    """``A_i`` is the cross-entropy, over classes, of ``cos(b(s_i), C_i) / temperature``, with the code table C.

    ``C_0`` is the identity ``(V, V)`` and ``C_i = g_i(sg C_{i-1})`` holds the codes ``(V, K_i)`` of all classes, so the
    cost of the target side does not depend on the batch size. t is ``(labels (B,), C (V, K))``;
    ``E_i = D_E(h_i(C_i), sg C_{i-1})``. The class of the nearest code is the prediction, which needs no decoder.

    Args:
        temperature: temperature of the softmax over cosines; small values suit many classes.
        learned_temperature: whether the associated loss trains each layer's temperature, starting from ``temperature``.
        label_smoothing: share of a label that ``A_i`` spreads over all classes.
        exit: how exits are scored: ``"nearest"`` by the cosine to the codes, ``"decode"`` through ``h_i .. h_1``.
    Raises:
        ALConfigError: the temperature is not positive, the smoothing out of range, or the exit unknown.
    """

    target_tensors = 2
    has_code_table = True

    def __init__(
        self,
        *,
        temperature: float = 0.1,
        learned_temperature: bool = False,
        label_smoothing: float = 0.0,
        exit: Literal["nearest", "decode"] = "nearest",
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ALConfigError(f"objective contrast: got temperature={temperature}: expected more than 0")
        if exit not in ("nearest", "decode"):
            raise ALConfigError(f"objective contrast: got exit={exit!r}: expected 'nearest' or 'decode'")
        check_smoothing(label_smoothing)
        self.exit = exit
        self.label_smoothing = label_smoothing
        self.has_code_table = exit == "nearest"
        log = torch.tensor([math.log(temperature)])  # DeepSpeed cannot broadcast a parameter without dimensions
        self.log_temperature: Tensor
        if learned_temperature:
            self.log_temperature = nn.Parameter(log)
        else:
            self.register_buffer("log_temperature", log, persistent=False)

    def first_target(self, labels: Tensor, one_hot: Tensor) -> tuple[Tensor, Tensor]:
        """Returns labels ``(B,)`` and the identity ``(V, V)``."""
        return labels, torch.eye(one_hot.shape[1], dtype=one_hot.dtype, device=one_hot.device)

    def encode(self, layer: Layer, t: Target) -> tuple[Tensor, Tensor]:
        """Returns the labels unchanged, and ``g(C)``."""
        labels, table = t
        return labels, layer.g(table)

    def associated_loss(self, layer: Layer, s_out: Activation, t_out: Target) -> Tensor:
        """Computes the cross-entropy of the cosines; no gradient reaches the table unless ``target_gradient`` is
        set."""
        labels, table = t_out
        scores = self.similarity(layer, s_out, table if layer.target_gradient else table.detach())
        return label_loss(scores, labels, smoothing=self.label_smoothing)

    def autoencoder_loss(self, layer: Layer, t_out: Target, t_in: Target) -> Tensor:
        """Computes ``D_E(h(C_i), C_{i-1})`` over all classes."""
        return layer.autoencoder_loss(layer.h(t_out[1]), t_in[1])

    def scores(self, layer: Layer, s: Activation, *, earlier: Sequence[nn.Module], table: Tensor | None) -> Tensor:
        """Returns the cosines to the codes divided by the temperature, or the scores through the decoders."""
        if self.exit == "decode":
            return decode([*earlier, layer.h], layer.bridge(s))
        assert table is not None
        return self.similarity(layer, s, table)

    def similarity(self, layer: Layer, s: Activation, table: Tensor) -> Tensor:
        """Computes ``cos(b(s), C) / temperature``, of shape ``(B, V)``."""
        code = F.normalize(to_float32(layer.bridge(s)), dim=1)
        return code @ F.normalize(to_float32(table), dim=1).t() / to_float32(self.log_temperature).exp()
