"""Objective ``readout``: intermediate layers predict the next token with the first layer's output embedding."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ds_al.errors import ALConfigError
from ds_al.objectives.base import Layer
from ds_al.objectives.next_token import NextToken


class Readout(NextToken):
    """``A_i`` is the cross-entropy of ``h_1(b(s_i))`` at every token against the token that follows it.

    ``h_1``, ``(B, T, D) -> (B, T, V)``, belongs to the first layer and is trained by ``A_1`` alone; if the model ties
    its embeddings, ``h_1`` is the input embedding itself. Later layers use a frozen copy of it, which is sent
    downstream and refreshed at fixed micro-batch numbers like the decoders of ``decoded``: before micro-batch 0, R, 2R,
    ... Hence an intermediate layer needs no weights of the vocabulary's size and no gradient of them, and the result
    depends neither on the partition nor on the schedule. The last layer has the model's own head.

    A layer whose h is ``nn.Identity`` uses ``h_1``; any other layer uses its own h.

    Args:
        refresh_every: R, in micro-batches. A refresh sends ``V D`` numbers from stage to stage.
        token_share, vocabulary_share, last_layer: see :class:`~ds_al.objectives.next_token.NextToken`.
    Raises:
        ALConfigError: an option is out of range.
    """

    needs_earlier_decoders = True

    def __init__(
        self,
        *,
        refresh_every: int = 20,
        token_share: float = 1.0,
        vocabulary_share: float = 1.0,
        last_layer: bool = False,
    ) -> None:
        super().__init__(token_share=token_share, vocabulary_share=vocabulary_share, last_layer=last_layer)
        if not isinstance(refresh_every, int) or refresh_every < 1:
            raise ALConfigError(f"objective readout: got refresh_every={refresh_every!r}: expected 1 or more")
        self.refresh_every = refresh_every

    def decoder(self, layer: Layer, earlier: Sequence[nn.Module]) -> nn.Module:
        """Returns ``h_1``, in the first and in the last layer its own h."""
        return earlier[0] if isinstance(layer.h, nn.Identity) else layer.h
