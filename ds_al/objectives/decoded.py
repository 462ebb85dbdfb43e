"""Objective ``decoded``: cross-entropy of the bridge's output, decoded to label scores through ``h_i .. h_1``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.func import functional_call

from ds_al.errors import ALConfigError
from ds_al.objectives.base import Layer, Objective
from ds_al.objectives.losses import check_smoothing, label_loss
from ds_al.objectives.mse import decode
from ds_al.tensors import Activation, Target


class Decoded(Objective):
    """``A_i`` is the cross-entropy of ``h_1(.. h_{i-1}(h_i(b(s_i))))`` against the label.

    ``h_1 .. h_{i-1}`` are frozen copies that are sent downstream and refreshed at fixed micro-batch numbers: they are
    the weights before micro-batch 0, R, 2R, ... Hence no layer waits for another one, and the result depends neither on
    the partition nor on the schedule. t is ``(labels (B,), code (B, K))``; ``E_i`` is that of ``mse``.

    Args:
        own_decoder: ``"frozen"``: ``E_i`` alone trains h_i; ``"live"``: ``A_i`` trains h_i, too.
        refresh_every: R, in micro-batches.
        label_smoothing: share of a label that ``A_i`` spreads over all classes.

    Raises:
        ALConfigError: an option is out of range.
    """

    target_tensors = 2
    needs_earlier_decoders = True

    def __init__(
        self,
        *,
        own_decoder: Literal["live", "frozen"] = "frozen",
        refresh_every: int = 10,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if own_decoder not in ("live", "frozen"):
            raise ALConfigError(f"objective decoded: got own_decoder={own_decoder!r}: expected 'live' or 'frozen'")
        if not isinstance(refresh_every, int) or refresh_every < 1:
            raise ALConfigError(f"objective decoded: got refresh_every={refresh_every!r}: expected 1 or more")
        check_smoothing(label_smoothing)
        self.own_decoder = own_decoder
        self.refresh_every = refresh_every
        self.label_smoothing = label_smoothing

    def first_target(self, labels: Tensor, one_hot: Tensor) -> tuple[Tensor, Tensor]:
        """Returns labels ``(B,)`` and one-hot labels ``(B, V)``."""
        return labels, one_hot

    def encode(self, layer: Layer, t: Target) -> tuple[Tensor, Tensor]:
        """Returns the labels unchanged, and ``g(code)``."""
        labels, code = t
        return labels, layer.g(code)

    def associated_loss(self, layer: Layer, s_out: Activation, t_out: Target) -> Tensor:
        """Computes the cross-entropy of the decoded scores."""
        code = layer.bridge(s_out)
        if self.own_decoder == "live":
            code = layer.h(code)
        else:
            frozen = {name: value.detach() for name, value in layer.h.named_parameters()}
            code = functional_call(layer.h, frozen, (code,))
        return label_loss(decode(self.earlier, code), t_out[0], smoothing=self.label_smoothing)

    def autoencoder_loss(self, layer: Layer, t_out: Target, t_in: Target) -> Tensor:
        """Computes ``D_E(h(t_i), t_{i-1})``."""
        return layer.autoencoder_loss(layer.h(t_out[1]), t_in[1])

    def scores(self, layer: Layer, s: Activation, *, earlier: Sequence[nn.Module], table: Tensor | None) -> Tensor:
        """Computes ``h_1(.. h_i(b(s)))`` with the current decoders."""
        return decode([*earlier, layer.h], layer.bridge(s))
