"""The linear layer that ends a head, a bridge, g or h: what comes out of it are scores or codes."""

from __future__ import annotations

from torch import nn


class Output(nn.Linear):
    """``nn.Linear`` whose weight :class:`~ds_al.optim.muon.MuonAdamW` leaves to AdamW, in the AL form as in the twin.

    Muon is meant for matrices between hidden activations. A classifier's rows are classes: steps of equal size along
    every direction suit them badly.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.weight.use_muon = False  # type: ignore[attr-defined]
