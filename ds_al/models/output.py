"""Final linear layer of a head, a bridge, g or h; its outputs are scores or codes."""

from __future__ import annotations

from torch import nn


class Output(nn.Linear):
    """``nn.Linear`` whose weight :class:`~ds_al.optim.muon.MuonAdamW` updates by AdamW, in the AL form and in the twin.

    Muon is designed for matrices between hidden activations. The rows of a classifier are classes, for which steps of
    equal size along every direction are unsuitable.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.weight.use_muon = False  # type: ignore[attr-defined]
